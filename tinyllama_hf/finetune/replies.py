"""How well a chat model replies to conversations it has not seen: loss of the true replies, and whether it stops."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat.masks import mask_replies
from ..chat.render import Messages, Rendering, render
from ..errors import InputError
from ..evaluation.models import load_evaluated, models_to_score
from ..evaluation.score_files import ReplyRow, ReplySample, ScoreFile, read_score_file
from ..evaluation.score_metrics import stop_rate
from ..inference.generation import Context
from ..provenance import file_sha256
from ..tokenization_tinyllama import load_tokenizer
from .conversations import HELD_OUT_FILE, read_conversations


MAX_NEW_TOKENS = 64


def score(
    models: Sequence[str],
    data: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "auto",
    quantization: str = "none",
    output: Path | None = None,
) -> dict[str, Any]:
    """Scores chat models on the last reply of each conversation.

    Args:
        models (`Sequence[str]`): model folders or names.
        data (`str`, *optional*): JSON lines of conversations; by default those that a fine-tuned folder held out.
        limit (`int`, *optional*): conversations, from the first; all by default.
        max_new_tokens (`int`, *optional*, defaults to 64): the budget of a reply.
        device (`str`, *optional*, defaults to `"auto"`): where the models run.
        quantization (`str`, *optional*, defaults to `"none"`): to quantise the models to while they are loaded; folders
            that were saved quantised have their own.
        output (`Path`, *optional*): JSON file, written after each model; what it has already is replaced.

    Returns:
        `dict`: contents of the score file; see [`score_replies`] for each model's entry.

    Raises:
        InputError: for anything missing, before the first model is scored.
    """
    for option, value in (("--limit", limit), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: must be at least 1")
    chosen = models_to_score(models, quantization)
    asked = [_read_asked(model.folder, data, limit) for model in chosen]
    read_score_file(
        output, "replies"
    )  # refuses a file of another task; the weights of a row are not recorded, so all are
    settings = {"decoding": "greedy"}  # scored again
    file = ScoreFile(output, "replies", settings, ReplyRow, lambda row: {(row.path, row.quantization)}, rescore=True)
    for model, (source, conversations) in zip(chosen, asked, strict=True):
        (loaded, _), tokenizer = load_evaluated(model, device), load_tokenizer(model.folder)
        with Progress(transient=True, disable=not Console().is_terminal) as bar:
            task = bar.add_task(f"Asking {model.name}", total=len(conversations))
            advance = functools.partial(bar.advance, task)
            scores = score_replies(loaded, tokenizer, conversations, max_new_tokens, advance)
        file.add(ReplyRow(**model.record(), data_sha256=file_sha256(source), **scores))
    return file.contents()


def _read_asked(folder: Path, data: str | None, limit: int | None) -> tuple[Path, list[Messages]]:
    """The file of conversations that a model is asked, and those that are used."""
    file = Path(data) if data else folder / HELD_OUT_FILE
    if not file.is_file():
        fix = "name another" if data else f"{folder} is no fine-tuned model with held-out conversations; name --data"
        raise InputError(f"{file}: no such file; {fix}")
    conversations = [conversation.messages for conversation in read_conversations(str(file))][:limit]
    if unfinished := [messages for messages in conversations if messages[-1]["role"] != "assistant"]:
        raise InputError(
            f"{file}: {len(unfinished)} conversations do not end with the assistant, whose reply is scored"
        )
    return file, conversations


@torch.inference_mode()
def reply_loss(model: PreTrainedModel, renderings: Sequence[Rendering], batch_size: int = 16) -> float:
    """Mean negative log-likelihood of the assistant's tokens, stop tokens included, in nats per token.

    Args:
        model (`PreTrainedModel`): a causal language model in evaluation mode.
        renderings (`Sequence[Rendering]`): from [`mask_replies`].
        batch_size (`int`, *optional*, defaults to 16): conversations of a forward pass.
    """
    total, count = 0.0, 0
    for batch in _batches(sorted(renderings, key=lambda r: len(r.input_ids)), batch_size):
        # Padding stands on the right, where causal attention lets no learned token see it.
        ids = pad_sequence([torch.tensor(rendering.input_ids) for rendering in batch], batch_first=True)
        learned = pad_sequence([torch.tensor(r.assistant_masks, dtype=torch.bool) for r in batch], batch_first=True)
        ids, learned = ids.to(model.device), learned[:, 1:].to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[learned].float()
        total += torch.nn.functional.cross_entropy(logits, ids[:, 1:][learned], reduction="sum").item()
        count += int(learned.sum())
    return total / count


@torch.inference_mode()
def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int = 20,
    advance: Callable[[int], Any] = lambda n: None,
) -> list[list[int]]:
    """Greedy replies to conversations that end with the user.

    Returns:
        The ids of each reply, its stop token included where it ended in one within `max_new_tokens`.

    Raises:
        InputError: if a prompt and its reply do not fit the context.
    """
    rendered = [render(tokenizer, messages, add_generation_prompt=True).input_ids for messages in prompts]
    Context.of(model).new_tokens(max(map(len, rendered)), max_new_tokens, "the longest question")
    replies: list[list[int]] = [[] for _ in rendered]
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    for numbers in _batches(order, batch_size):
        # Padding stands on the left, since generation continues at the right.
        prompts_ids = [torch.tensor(rendered[i]) for i in numbers]
        pad = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(prompts_ids, padding_value=tokenizer.pad_token_id, **pad)
        mask = pad_sequence([torch.ones_like(row) for row in prompts_ids], **pad)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for row, i in enumerate(numbers):
            new = output[row, ids.shape[1] :].tolist()
            end = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
            replies[i] = new[:end]
        advance(len(numbers))
    return replies


def score_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    max_new_tokens: int = MAX_NEW_TOKENS,
    advance: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """Scores the last reply of each conversation.

    Args:
        model (`PreTrainedModel`): a chat model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a template that shows which tokens are replies, see
            [`mask_replies`].
        conversations (`Sequence[Messages]`): each ends with the assistant.
        max_new_tokens (`int`, *optional*, defaults to 64): the budget of a reply.
        advance (`Callable`, *optional*): called with the number of replies done.

    Returns:
        `dict`: `stop_rate` and `median_length` (tokens without the stop token), by [`stop_rate`]; `loss` of the
        true replies in nats per token; and each question with the model's reply and the true one.

    Raises:
        InputError: if the template does not show which tokens are replies, or a question does not fit the context.
    """
    renderings = []
    for number, messages in enumerate(conversations, start=1):
        where = f"conversation {number}"
        renderings.append(mask_replies(tokenizer, messages, render(tokenizer, messages, where=where), where))
    replies = generate_replies(model, tokenizer, [c[:-1] for c in conversations], max_new_tokens, advance=advance)
    stops = stop_rate(replies, tokenizer.eos_token_id)
    loss = reply_loss(model, renderings)
    if not math.isfinite(loss):
        raise InputError("the loss of the replies is not finite; the model is broken")
    samples = [
        ReplySample(
            question=messages[-2]["content"],
            reply=tokenizer.decode(reply, skip_special_tokens=True).strip(),
            stopped=reply[-1] == tokenizer.eos_token_id,
            true=messages[-1]["content"],
        )
        for messages, reply in zip(conversations, replies, strict=True)
    ]
    return {"replies": len(replies), "max_new_tokens": max_new_tokens, **stops, "loss": loss, "samples": samples}


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
