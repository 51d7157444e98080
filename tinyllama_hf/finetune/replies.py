"""Scores a chat model on held-out conversations: the loss of the true replies, and whether its own replies end."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat.render import Messages, render
from ..decoding.speculative import generate_recorded
from ..errors import InputError
from ..evaluation.models import list_eval_models, load_eval_model
from ..evaluation.score_files import (
    ReplyRow,
    ReplySample,
    ReplyScoreFile,
    ReplyScores,
    read_contents,
    replace_rows,
    write_scores,
)
from ..evaluation.score_metrics import median_length, stop_rate
from ..inference.generation import Context
from ..progress import progress_bar
from ..provenance import file_sha256
from ..text import decode_text
from ..tokenization_tinyllama import load_tokenizer
from .conversations import HELD_OUT_FILE, TrainingExample, mark_replies, read_conversations


MAX_NEW_TOKENS = 64
_LOSS_TOKENS = 8192  # of a forward pass; bounds the memory of the logits, 1 GB in fp32 for 32,000 tokens


def score_replies(
    models: Sequence[str],
    data: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "auto",
    quantization: str = "none",
    output: Path | None = None,
) -> list[ReplyRow]:
    """Scores chat models on the last reply of each conversation.

    Args:
        models (`Sequence[str]`): model folders or names.
        data (`str`, *optional*): JSON lines of conversations. Defaults to the held-out ones of each fine-tuned folder.
        limit (`int`, *optional*): number of conversations, from the first; by default all.
        max_new_tokens (`int`, *optional*, defaults to 64): maximum number of tokens of a reply.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. Folders that were
            saved quantized keep their own.
        output (`Path`, *optional*): JSON file, written after each model. Earlier scores in it are replaced.

    Returns:
        `list[ReplyRow]`: the scores, in the order of the models. The score file has the same rows.

    Raises:
        InputError: for missing input, before the first model is scored.
    """
    for option, value in (("--limit", limit), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: must be at least 1")
    chosen = list_eval_models(models, quantization)
    held_out = [_read_held_out(model.folder, data, limit) for model in chosen]
    # Rows do not record the weights, so all models are scored again.
    file = ReplyScoreFile(models=[])
    read_contents(output, file.task)  # raises for a file of another task
    for model, (source, conversations) in zip(chosen, held_out, strict=True):
        with progress_bar(f"{model.name}: replies", "conversations", len(conversations)) as update:
            (loaded, _), tokenizer = load_eval_model(model, device), load_tokenizer(model.folder)
            scores = score_model_replies(loaded, tokenizer, conversations, max_new_tokens, update)
        row = ReplyRow(**vars(model), data_sha256=file_sha256(source), **vars(scores))
        replace_rows(file.models, [other for other in file.models if other.path == row.path], row)
        write_scores(output, file)
    return file.models


def _read_held_out(folder: Path, data: str | None, limit: int | None) -> tuple[Path, Sequence[Messages]]:
    """Returns the file of conversations for a model, and the conversations."""
    file = Path(data) if data else folder / HELD_OUT_FILE
    if not file.is_file():
        fix = "Name another" if data else f"{folder} has no held-out conversations of a fine-tuning; pass --data"
        raise InputError(f"{file}: no such file. {fix}")
    conversations = [conversation.messages for conversation in read_conversations(str(file))][:limit]
    if unfinished := [messages for messages in conversations if messages[-1]["role"] != "assistant"]:
        raise InputError(
            f"{file}: {len(unfinished)} conversations do not end with the assistant. The last reply is scored; remove "
            "them"
        )
    return file, conversations


def reply_loss(model: PreTrainedModel, examples: Sequence[TrainingExample], batch_size: int = 16) -> float:
    """Returns the mean negative log-likelihood of the replies' tokens, including stop tokens, in nats per token.

    Args:
        model (`PreTrainedModel`): a causal language model in evaluation mode.
        examples (`Sequence[TrainingExample]`): conversations with loss masks.
        batch_size (`int`, *optional*, defaults to 16): conversations per forward pass, fewer if they are long.
    """
    total, count = summed_reply_loss(model, examples, batch_size)
    return total / count


def summed_reply_loss(
    model: PreTrainedModel, examples: Sequence[TrainingExample], batch_size: int = 16
) -> tuple[float, int]:
    """Returns the summed loss of [`reply_loss`], and the number of tokens."""
    total = sum(reply_losses(model, examples, batch_size))
    return total, sum(sum(example.assistant_masks[1:]) for example in examples)


@torch.inference_mode()
def reply_losses(model: PreTrainedModel, examples: Sequence[TrainingExample], batch_size: int = 16) -> list[float]:
    """Returns for each conversation the summed negative log-likelihood of its tokens with loss, in nats."""
    losses = [0.0] * len(examples)
    for numbers in _loss_batches(examples, batch_size):
        # Padded on the right: with causal attention, no token with loss attends to padding.
        ids = pad_sequence([torch.tensor(examples[i].input_ids) for i in numbers], batch_first=True)
        masks = [torch.tensor(examples[i].assistant_masks, dtype=torch.bool) for i in numbers]
        has_loss = pad_sequence(masks, batch_first=True)
        ids, has_loss = ids.to(model.device), has_loss[:, 1:].to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[has_loss].float()
        tokens = torch.nn.functional.cross_entropy(logits, ids[:, 1:][has_loss], reduction="none")
        for i, own in zip(numbers, tokens.cpu().split(has_loss.sum(1).tolist()), strict=True):
            losses[i] = own.double().sum().item()
    return losses


@torch.inference_mode()
def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int = 20,
    update: Callable[..., Any] = lambda **fields: None,
) -> list[list[int]]:
    """Returns greedy replies to conversations that end with the user.

    Returns:
        The token ids of each reply, including the stop token if the reply ended within `max_new_tokens`.

    Raises:
        InputError: if a prompt and its reply do not fit into the context.
    """
    rendered = [render(tokenizer, messages, add_generation_prompt=True).input_ids for messages in prompts]
    Context.of(model).new_tokens(max(map(len, rendered)), max_new_tokens, "the longest question")
    replies: list[list[int]] = [[] for _ in rendered]
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    for numbers in _batches(order, batch_size):
        # Padded on the left, since generation continues on the right.
        batch = tokenizer.pad(
            {"input_ids": [rendered[i] for i in numbers]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        arguments = {
            **batch,
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        output = generate_recorded(model, **arguments)
        if output is None:
            output = model.generate(**arguments)  # type: ignore[operator]  # of GenerationMixin, unknown to PreTrainedModel
        for row, i in enumerate(numbers):
            new = output[row, batch["input_ids"].shape[1] :].tolist()
            end = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
            replies[i] = new[:end]
        update(advance=len(numbers))
    return replies


def score_model_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    max_new_tokens: int = MAX_NEW_TOKENS,
    update: Callable[..., Any] = lambda **fields: None,
) -> ReplyScores:
    """Scores the last reply of each conversation.

    Args:
        model (`PreTrainedModel`): a chat model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template that [`mask_replies`] supports.
        conversations (`Sequence[Messages]`): conversations that end with the assistant.
        max_new_tokens (`int`, *optional*, defaults to 64): maximum number of tokens of a reply.
        update (`Callable`, *optional*): called with `advance`, the number of new replies, as `rich.Progress.update`.

    Raises:
        InputError: if the template does not mark the replies, or a question does not fit into the context.
    """
    examples = []
    for number, messages in enumerate(conversations, start=1):
        where = f"conversation {number}"
        examples.append(mark_replies(tokenizer, messages, render(tokenizer, messages, where=where), where))
    replies = generate_replies(model, tokenizer, [c[:-1] for c in conversations], max_new_tokens, update=update)
    loss = reply_loss(model, examples)
    if not math.isfinite(loss):
        raise InputError(
            "the loss of the replies is not finite. The weights are damaged or the training diverged; score another "
            "model"
        )
    samples = [
        ReplySample(
            question=messages[-2]["content"],
            reply=decode_text(tokenizer, reply).strip(),
            stopped=reply[-1] == tokenizer.eos_token_id,
            true=messages[-1]["content"],
        )
        for messages, reply in zip(conversations, replies, strict=True)
    ]
    return ReplyScores(
        replies=len(replies),
        max_new_tokens=max_new_tokens,
        stop_rate=stop_rate(replies, tokenizer.eos_token_id),
        median_length=median_length(replies, tokenizer.eos_token_id),
        loss=loss,
        samples=samples,
    )


def _loss_batches(examples: Sequence[TrainingExample], batch_size: int) -> Iterator[list[int]]:
    """Yields the numbers of conversations of similar length, with at most `_LOSS_TOKENS` tokens unless it is one."""
    batch: list[int] = []
    for number in sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids)):
        padded = (len(batch) + 1) * len(examples[number].input_ids)
        if batch and (len(batch) == batch_size or padded > _LOSS_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
