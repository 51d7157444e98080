"""Chat templates by name, and the contract that a template must keep to be trained with."""

import itertools
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import InputError, did_you_mean
from .render import Messages, has_generation_markers, render


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
    return path.read_text(encoding="utf-8")


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that training on the tokenizer's chat template teaches to reply and to stop, and nothing else.

    The template must mark the assistant's part; a conversation begins with begin-of-sequence and never has two in a
    row; what is marked is each reply and the stop token after it; what `chat` feeds before a reply is what training
    showed before it; and stock `apply_chat_template` gives the same tokens.

    Raises:
        InputError: naming the rule that is broken.
    """
    if not has_generation_markers(tokenizer.chat_template or ""):
        raise InputError(
            "chat template: has no {% generation %} markers, so that it is not known which tokens are the assistant's; "
            "put them around the reply and its stop token, or use chat.template llama2"
        )
    for messages in _PROBES:
        _check_probe(tokenizer, messages)


def _check_probe(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> None:
    ids, masks = render(tokenizer, messages)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if ids[:1] != [bos] or any(a == b == bos for a, b in itertools.pairwise(ids)):
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
    stretches = _stretches(ids, masks)
    learned = [tokenizer.decode(stretch) for stretch in stretches]
    for reply, stretch in zip(replies, stretches, strict=False):
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
    before_last_reply = len(ids) - masks[::-1].index(1) - len(stretches[-1])
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True).input_ids
    if prompt != ids[:before_last_reply]:
        raise InputError(
            "chat template: with a generation prompt it ends in other tokens than those before a reply in a whole "
            "conversation; a model would be asked in another form than it was trained in"
        )


def _stretches(ids: list[int], masks: list[int]) -> list[list[int]]:
    """The runs of tokens that are masked 1."""
    found: list[list[int]] = []
    for i, (token, mask) in enumerate(zip(ids, masks, strict=True)):
        if mask:
            if i == 0 or not masks[i - 1]:
                found.append([])
            found[-1].append(token)
    return found
