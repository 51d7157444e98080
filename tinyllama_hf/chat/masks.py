"""Which tokens of a conversation a model learns: each reply and its stop token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .messages import is_learned
from .render import Messages, Rendering, render


def mask_replies(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, rendering: Rendering, where: str = "conversation"
) -> Rendering:
    """Marks the learned tokens of a rendered conversation.

    A template with generation markers says which they are. Without markers they follow from the template's own renderings:
    the conversation up to a reply, with the generation prompt, has to begin the whole conversation, token by token, and so
    has the conversation up to and with the reply. What lies between is the reply, up to its first end-of-sequence. Replies
    of weight 0 are left out.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer with a chat template.
        messages (`Messages`): the conversation.
        rendering (`Rendering`): the whole of it, from [`render`].
        where (`str`, *optional*): names the conversation in errors.

    Raises:
        InputError: if the template has no markers and its renderings do not show where a reply begins and ends.
    """
    ids, masks = rendering
    if masks is None:
        masks = _proven_masks(tokenizer, messages, ids, where)
    replies = [message for message in messages if message["role"] == "assistant"]
    if not all(map(is_learned, replies)):
        found = stretches(masks)
        if len(found) != len(replies):
            raise InputError(
                f"{where}: has replies of weight 0, but the chat template marks {len(found)} stretches for {len(replies)} "
                "replies; put the generation markers around each reply"
            )
        masks = list(masks)
        for (start, end), reply in zip(found, replies, strict=True):
            if not is_learned(reply):
                masks[start:end] = [0] * (end - start)
    return Rendering(ids, masks)


def stretches(masks: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of ones."""
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
                f"{place}: the chat template ends the reply with {last or 'nothing'}, without the tokenizer's "
                f"end-of-sequence {tokenizer.eos_token!r}, so a model would never learn to stop. Set eos_token to the token "
                "that ends a reply, or write it after the reply"
            )
        end = ids.index(tokenizer.eos_token_id, start) + 1
        masks[start:end] = [1] * (end - start)
    return masks


def _common(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, ids: list[int], add_generation_prompt: bool, place: str
) -> int:
    """The number of tokens of the first messages, which must begin the whole conversation."""
    first = render(tokenizer, messages, add_generation_prompt, place).input_ids
    if ids[: len(first)] == first:
        return len(first)
    same = next((i for i, (a, b) in enumerate(zip(ids, first, strict=False)) if a != b), min(len(ids), len(first)))
    alone, whole = (tokenizer.convert_ids_to_tokens(tokens[same : same + 4]) for tokens in (first, ids))
    raise InputError(
        f"{place}: the chat template has no {{% generation %}} markers, and its rendering does not show which tokens are the "
        f"reply: from token {same} on, the conversation up to here is {alone} and the whole conversation {whole}. Remove "
        "white space around the reply if that is the difference; else use a .jinja file with markers around the reply and "
        "its stop token"
    )
