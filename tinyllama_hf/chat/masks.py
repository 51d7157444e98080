"""Marks the tokens of a conversation that a model is trained on: each reply and its stop token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .messages import is_learned
from .render import Messages, Rendering, render


def mask_replies(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, rendering: Rendering, where: str = "conversation"
) -> Rendering:
    """Marks the tokens of a rendered conversation that a model is trained on.

    With generation markers in the template, these are the marked tokens. Without them they are derived from renderings
    of parts of the conversation. Two parts must be prefixes of the whole conversation, token by token: the messages
    before a reply with the generation prompt, and the messages up to and including the reply. The tokens between the
    ends of these prefixes are the reply, up to its first end-of-sequence token. Replies with weight 0 are not marked.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer with a chat template.
        messages (`Messages`): the conversation.
        rendering (`Rendering`): the rendered conversation, from [`render`].
        where (`str`, *optional*): name of the conversation in error messages.

    Raises:
        InputError: if the template has no markers, and its renderings do not show where a reply starts and ends.
    """
    ids, masks = rendering
    if masks is None:
        masks = _proven_masks(tokenizer, messages, ids, where)
    replies = [message for message in messages if message["role"] == "assistant"]
    if not all(map(is_learned, replies)):
        found = reply_spans(masks)
        if len(found) != len(replies):
            raise InputError(
                f"{where}: has replies of weight 0, but the generation markers of the chat template mark {len(found)} "
                f"spans for {len(replies)} replies. Put the markers around each reply"
            )
        masks = list(masks)
        for (start, end), reply in zip(found, replies, strict=True):
            if not is_learned(reply):
                masks[start:end] = [0] * (end - start)
    return Rendering(ids, masks)


def reply_spans(masks: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (start, end) of each run of ones."""
    edges = [i for i in range(len(masks) + 1) if (i < len(masks) and masks[i]) != (i > 0 and masks[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _proven_masks(tokenizer: PreTrainedTokenizerBase, messages: Messages, ids: list[int], where: str) -> list[int]:
    masks = [0] * len(ids)
    for number in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        place = f"{where}, message {number}"
        start = _common(tokenizer, messages[:number], ids, True, place)
        end = _common(tokenizer, messages[: number + 1], ids, False, place) if number + 1 < len(messages) else len(ids)
        if tokenizer.eos_token_id not in ids[start:end]:
            last = tokenizer.convert_ids_to_tokens(ids[start:end][-3:])
            raise InputError(
                f"{place}: the chat template ends the reply with {last or 'nothing'}, not with the tokenizer's "
                f"end-of-sequence token {tokenizer.eos_token!r}, so a model would not learn to stop. Write eos_token "
                "or another control token of the tokenizer after the reply"
            )
        end = ids.index(tokenizer.eos_token_id, start) + 1
        masks[start:end] = [1] * (end - start)
    return masks


def _common(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, ids: list[int], add_generation_prompt: bool, place: str
) -> int:
    """Returns the number of tokens of the first messages, which must be a prefix of the whole conversation."""
    first = render(tokenizer, messages, add_generation_prompt, place).input_ids
    if ids[: len(first)] == first:
        return len(first)
    same = next((i for i, (a, b) in enumerate(zip(ids, first, strict=False)) if a != b), min(len(ids), len(first)))
    alone, whole = (tokenizer.convert_ids_to_tokens(tokens[same : same + 4]) for tokens in (first, ids))
    raise InputError(
        f"{place}: the chat template has no {{% generation %}} markers, and its renderings do not show which tokens "
        f"are the reply: starting at token {same}, the messages so far give {alone}, and the whole conversation gives "
        f"{whole}. Remove white space around the reply if that is the difference. Otherwise use a .jinja file with "
        "markers around the reply and its stop token"
    )
