"""Chat templates by name, and the contract that a template must keep to be trained with."""

import itertools
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import InputError, did_you_mean
from ..text import read_text
from .masks import mask_replies, stretches
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
    """The templates that come along."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def load_template(name: str) -> str:
    """Returns the text of a template.

    Args:
        name (`str`): one of [`template_names`], or a file ending in `.jinja`.

    Raises:
        InputError: if there is no such template.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file():
        raise InputError(
            f"chat template {name!r} does not exist{did_you_mean(name, template_names())}, or a .jinja file"
        )
    return read_text(path)


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str, model: str) -> str:
    """Gives a tokenizer the template that it is to be trained with, and checks it by [`check_template`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model that is fine-tuned; its `chat_template` is set.
        name (`str`): `"auto"` for the one that the model has, or `llama2` where it has none; `"own"` for the one that it
            has; else as for [`load_template`].
        model (`str`): names the model in errors.

    Returns:
        What was chosen, for a summary.

    Raises:
        InputError: if there is no such template, or it cannot be trained with.
    """
    own = tokenizer.chat_template
    if name in (AUTO, OWN) and own and not isinstance(own, str):
        raise InputError(f"chat.template: {name}, but {model} has several templates; name one, as a .jinja file")
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
    """Checks that training on the tokenizer's chat template teaches to reply and to stop, and nothing else.

    It must be known which tokens are the assistant's, see [`mask_replies`]: each reply and the stop token after it. A
    conversation begins with begin-of-sequence and never has two in a row. What `chat` feeds before a reply is what training
    showed before it. Stock `apply_chat_template` gives the same tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        is_own (`bool`, *optional*, defaults to `False`): whether the model was trained in this template before. Then a
            conversation may begin as it does there, without begin-of-sequence.

    Raises:
        InputError: naming the rule that is broken.
    """
    for messages in _PROBES:
        _check_probe(tokenizer, messages, is_own)


def _check_probe(tokenizer: PreTrainedTokenizerBase, messages: Messages, is_own: bool) -> None:
    where = f"chat template, conversation of {len(messages)} messages"
    ids, masks = mask_replies(tokenizer, messages, render(tokenizer, messages, where=where), where)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = bos is not None and any(a == b == bos for a, b in itertools.pairwise(ids))
    if doubled or (ids[:1] != [bos] and not is_own):
        raise InputError(
            f"chat template: a conversation must begin with one begin-of-sequence {tokenizer.bos_token!r} and never have two "
            f"in a row; this one begins {tokenizer.convert_ids_to_tokens(ids[:3])}"
        )
    if tokenizer.apply_chat_template(list(messages), return_dict=False) != ids:
        raise InputError(
            "chat template: apply_chat_template gives other tokens than its parts one by one; the tokenizer treats a text "
            "after a control token differently, which is not supported"
        )
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    learned_ids = [ids[start:end] for start, end in stretches(masks)]
    learned = [tokenizer.decode(stretch) for stretch in learned_ids]
    for reply, stretch in zip(replies, learned_ids, strict=False):
        if stretch[-1] != eos:
            raise InputError(
                f"chat template: the stop token {tokenizer.eos_token!r} is not inside the generation markers after the reply "
                f"{reply!r}, so that a model would never learn to stop; put it before endgeneration"
            )
    if [text.removesuffix(tokenizer.eos_token).strip() for text in learned] != replies:
        raise InputError(
            f"chat template: the generation markers cover {learned}; they must cover the replies {replies} with their stop "
            "tokens and nothing else"
        )
    before_last_reply = stretches(masks)[-1][0]
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True).input_ids
    if prompt != ids[:before_last_reply]:
        raise InputError(
            "chat template: with a generation prompt it ends in other tokens than those before a reply in a whole "
            "conversation; a model would be asked in another form than it was trained in"
        )
