"""Chat templates by name, and the requirements on a template for training."""

import itertools
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import InputError, did_you_mean
from ..text import decode_text, read_text
from .masks import mask_replies, reply_spans
from .render import Messages, render


AUTO, OWN, DEFAULT = "auto", "own", "llama2"
_FOLDER = Path(__file__).parent
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


def load_template(name: str) -> str:
    """Returns the text of a template.

    Args:
        name (`str`): one of [`template_names`], or a file ending in `.jinja`.

    Raises:
        InputError: if it does not exist.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file():
        raise InputError(f"unknown chat template {name!r}{did_you_mean(name, template_names())}, or a .jinja file")
    return read_text(path)


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str, model: str) -> str:
    """Sets the chat template of a tokenizer for fine-tuning, and checks it with [`check_template`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model; its `chat_template` is set.
        name (`str`): `"own"` for the model's template; `"auto"` for the same, or `llama2` if the model has none;
            otherwise as in [`load_template`].
        model (`str`): name of the model in error messages.

    Returns:
        A description of the choice, for a summary.

    Raises:
        InputError: if the template does not exist, or is not suitable for training.
    """
    own = tokenizer.chat_template
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
        tokenizer.chat_template = load_template(loaded)
        replaced = bool(own) and own != tokenizer.chat_template
        chosen = f"{loaded}, which replaces the model's own" if replaced else loaded
    check_template(tokenizer, is_own=tokenizer.chat_template == own)
    return chosen


def check_template(tokenizer: PreTrainedTokenizerBase, is_own: bool = False) -> None:
    """Checks that a model that is trained with the tokenizer's chat template learns to reply and to stop.

    These are the rules:

    - the tokens of the assistant are known (see [`mask_replies`]): each reply and its stop token, and nothing else;
    - a conversation starts with the begin-of-sequence token, and never has two in a row;
    - the tokens before a reply are the same in `chat` and in training;
    - `apply_chat_template` of transformers gives the same tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with a chat template.
        is_own (`bool`, *optional*, defaults to `False`): the model was already trained with this template, in which
            conversations may start without the begin-of-sequence token.

    Raises:
        InputError: naming the rule that is broken.
    """
    for messages in _PROBES:
        _check_probe(tokenizer, messages, is_own)


def _check_probe(tokenizer: PreTrainedTokenizerBase, messages: Messages, is_own: bool) -> None:
    where = f"chat template, conversation of {len(messages)} messages"
    ids, masks = mask_replies(tokenizer, messages, render(tokenizer, messages, where=where), where)
    assert masks is not None  # `mask_replies` always returns them
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = bos is not None and any(a == b == bos for a, b in itertools.pairwise(ids))
    if doubled or (ids[:1] != [bos] and not is_own):
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
            f"chat template: the generation markers include {learned}; they must include the replies {replies} with "
            "their stop tokens, and nothing else"
        )
    if render(tokenizer, messages[:-1], add_generation_prompt=True).input_ids != ids[: spans[-1][0]]:
        raise InputError(
            "chat template: the generation prompt differs from the tokens before a reply in a whole conversation, so "
            "a model would be prompted in another format than in training"
        )
