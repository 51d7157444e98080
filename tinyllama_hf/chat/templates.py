"""Chat templates by name, and the requirements on a template for training."""

import itertools
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ..errors import InputError, did_you_mean
from ..text import decode_text, read_text
from .masks import mask_replies, reply_spans
from .render import Messages, render


AUTO, OWN, DEFAULT = "auto", "own", "llama2"
_FOLDER = Path(__file__).parent
# The control tokens that a bundled template writes itself; the last one ends a reply.
_REQUIRED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
_PROBES: tuple[Messages, ...] = (
    ({"role": "user", "content": "Two words"}, {"role": "assistant", "content": "Three words more."}),
    (
        {"role": "system", "content": "A rule."},
        {"role": "user", "content": "  First?\n"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second?"},
        {"role": "assistant", "content": "Two,\nover lines."},
    ),
)


def template_names() -> list[str]:
    """Returns the names of the bundled templates."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def template_file(name: str) -> Path:
    """Returns the file of a template.

    Args:
        name (`str`): one of [`template_names`], or a file ending in `.jinja`.

    Raises:
        InputError: if it does not exist.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file():
        raise InputError(f"unknown chat template {name!r}{did_you_mean(name, template_names())}, or a .jinja file")
    return path


def load_template(name: str) -> str:
    """Returns the text of a template; see [`template_file`]."""
    return read_text(template_file(name))


def required_tokens(name: str) -> tuple[str, ...]:
    """Returns the control tokens that a tokenizer must have for a bundled template; the last one ends a reply.

    Templates that use only begin- and end-of-sequence need none. For a `.jinja` file, nothing is returned.
    """
    return _REQUIRED.get(name, ())


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str, model: str) -> str:
    """Sets the chat template of a tokenizer for fine-tuning, and checks it with [`check_template`].

    If the template ends replies with a control token that is not the tokenizer's end-of-sequence token, that token
    becomes the end-of-sequence token, so that the fine-tuned model stops there.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model; its `chat_template` is set, and `eos_token`
            if replies end with another token.
        name (`str`): `"own"` for the model's template; `"auto"` for the same, or `llama2` if the model has none;
            otherwise as in [`load_template`].
        model (`str`): name of the model in error messages.

    Returns:
        A description of the choice, for a summary.

    Raises:
        InputError: if the template does not exist, needs tokens that the tokenizer does not have, or is not suitable
            for training.
    """
    own, eos = tokenizer.chat_template, tokenizer.eos_token
    if name in (AUTO, OWN) and own and not isinstance(own, str):
        raise InputError(
            f"chat.template: {name}, but {model} has several templates; save one as a .jinja file and name it"
        )
    if name == OWN and not own:
        raise InputError(f"chat.template: {OWN}, but {model} has no chat template; use {AUTO} or {DEFAULT}")
    if name == OWN or (name == AUTO and own):
        chosen = "the model's own"
    else:
        loaded = DEFAULT if name == AUTO else name
        set_template(tokenizer, loaded, model)
        chosen = f"{loaded}, which replaces the model's own" if own and own != tokenizer.chat_template else loaded
    _set_stop_token(tokenizer)
    check_template(tokenizer, is_own=tokenizer.chat_template == own)
    if tokenizer.eos_token == eos:
        return chosen
    return f"{chosen}; {tokenizer.eos_token} ends a reply and replaces {eos} as end-of-sequence token"


def set_template(tokenizer: PreTrainedTokenizerBase, name: str, model: str) -> None:
    """Sets the chat template of a tokenizer, and for a bundled template that needs control tokens also `eos_token`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        name (`str`): as in [`load_template`].
        model (`str`): name of the model in error messages.

    Raises:
        InputError: if the template does not exist, or needs tokens that the tokenizer does not have.
    """
    tokenizer.chat_template = load_template(name)
    if not (required := required_tokens(name)):
        return
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in required if token not in vocabulary]:
        free = [other for other in template_names() if not required_tokens(other)]
        raise InputError(
            f"chat template {name} needs {', '.join(missing)}, which the tokenizer of {model} does not have. Use "
            f"{' or '.join(free)}, which need no tokens of their own, or add them with model.new_tokens"
        )
    # A token that is not special would also be found in the text of messages.
    tokens = [AddedToken(token, special=True, normalized=False) for token in required]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.eos_token = required[-1]


def _set_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the control token after a reply the end-of-sequence token.

    Changes nothing if there is none right after the reply, which `check_template` refuses.
    """
    messages, eos = _PROBES[0], tokenizer.eos_token
    ids = render(tokenizer, messages).input_ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls = [-1, *(place for place, i in enumerate(ids) if i in special)]
    for before, place in itertools.pairwise(controls):
        text = decode_text(tokenizer, ids[before + 1 : place], skip_special_tokens=False)
        if text.strip().endswith(messages[-1]["content"]):
            break
    else:
        return
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[place])
    if render(tokenizer, messages).input_ids != ids:
        raise InputError(
            f"chat template: replies end with {tokenizer.eos_token!r}, but the template also writes eos_token, which "
            f"is {eos!r}. A model must stop at one token. Save the template as a .jinja file with only one of them"
        )


def check_template(tokenizer: PreTrainedTokenizerBase, is_own: bool = False) -> None:
    """Checks that a model that is trained with the tokenizer's chat template learns to reply and to stop.

    These are the rules:

    - the tokens of the assistant are known (see [`mask_replies`]): each reply and its stop token, and nothing else;
    - a conversation starts with the begin-of-sequence token, if the tokenizer has one, and never has two in a row;
    - the tokens before a reply are the same in `chat` and in training;
    - `apply_chat_template` of transformers gives the same tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with a chat template.
        is_own (`bool`, *optional*, defaults to `False`): the model was already trained with this template, in which
            conversations may start without the begin-of-sequence token.

    Raises:
        InputError: naming the rule that is broken.
    """
    alone, turns = _PROBES
    try:
        render(tokenizer, turns)
    except InputError:  # some templates refuse system messages
        turns = turns[1:]
    for messages in (alone, turns):
        _check_probe(tokenizer, messages, is_own)


def _check_probe(tokenizer: PreTrainedTokenizerBase, messages: Messages, is_own: bool) -> None:
    where = f"chat template, conversation of {len(messages)} messages"
    ids, masks = mask_replies(tokenizer, messages, render(tokenizer, messages, where=where), where)
    assert masks is not None  # `mask_replies` always returns them
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = any(a == b == bos for a, b in itertools.pairwise(ids))
    if bos is not None and (doubled or (ids[0] != bos and not is_own)):
        raise InputError(
            f"chat template: a conversation must start with one begin-of-sequence token {tokenizer.bos_token!r} and "
            f"never have two in a row; this one starts with {tokenizer.convert_ids_to_tokens(ids[:3])}"
        )
    if tokenizer.apply_chat_template([dict(message) for message in messages], return_dict=False) != ids:
        raise InputError(
            "chat template: apply_chat_template gives other tokens than the separate encoding of text and control "
            "tokens. The tokenizer encodes text after a control token differently, which is not supported"
        )
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    spans = reply_spans(masks)
    learned_ids = [ids[start:end] for start, end in spans]
    learned = [decode_text(tokenizer, span, skip_special_tokens=False) for span in learned_ids]
    for reply, span in zip(replies, learned_ids, strict=False):
        if span[-1] != eos:
            raise InputError(
                f"chat template: the generation markers around the reply {reply!r} do not include the stop token "
                f"{tokenizer.eos_token!r}, so a model would not learn to stop. Put it before endgeneration"
            )
    if [text.removesuffix(tokenizer.eos_token).strip() for text in learned] != replies:
        raise InputError(
            f"chat template: the tokens to learn are {learned}; they must be the replies {replies} with their stop "
            "tokens, and nothing else. Correct the generation markers, or without markers what the template writes "
            "for add_generation_prompt"
        )
    if render(tokenizer, messages[:-1], add_generation_prompt=True).input_ids != ids[: spans[-1][0]]:
        raise InputError(
            "chat template: the generation prompt differs from the tokens before a reply in a whole conversation, so "
            "a model would be prompted in another format than in training"
        )
