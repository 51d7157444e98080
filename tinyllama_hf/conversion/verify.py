"""Compares what two checkpoints of any layouts compute, and checks that a checkpoint computes anything sensible."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ..errors import InputError
from ..text import read_text
from ..tokenization_tinyllama import encode_text
from .checkpoint import Checkpoint
from .reading.recognize import open_checkpoint


MAX_TOKENS = 512
TOLERANCE = 1e-5
_SAMPLE = Path(__file__).with_name("sample.txt")


class Verification(NamedTuple):
    """The differences between the logits of two checkpoints on the same tokens.

    `first_position` is the first position where a logit differs by more than the tolerance, or `None`.
    `argmax_agreement` is the share of positions where both have the same most likely token.
    """

    layouts: tuple[str, str]
    inputs: str
    num_tokens: int
    largest: float
    mean: float
    first_position: int | None
    argmax_agreement: float
    tolerance: float
    notes: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether no logit differs by more than the tolerance."""
        return self.first_position is None


class TensorDifference(NamedTuple):
    """A tensor of two checkpoints: largest and mean absolute difference, which are infinite if the shapes differ."""

    name: str
    is_same_bits: bool
    largest: float
    mean: float
    what: str


def verify(
    a: str | Path,
    b: str | Path,
    *,
    text: str | Path | None = None,
    tolerance: float = TOLERANCE,
    config: str | Path | None = None,
) -> Verification:
    """Compares the logits of two checkpoints in any layouts, computed in fp32 on the same tokens.

    Args:
        a, b (`str` or `Path`): files, folders, released names or Hub ids.
        text (`str` or `Path`, *optional*): a text file, of which the first 512 tokens are used; by default a bundled
            text, or random ids if neither checkpoint has a tokenizer.
        tolerance (`float`, *optional*, defaults to 1e-5): largest allowed difference of a logit.
        config (`str` or `Path`, *optional*): a configuration for a checkpoint without one.

    Raises:
        InputError: if a checkpoint cannot be read, or the two cannot be compared.
    """
    if not tolerance >= 0:
        raise InputError(f"--tolerance {tolerance}: it must be 0 or more")
    first, second = _open(a, config), _open(b, config)
    tokens, inputs = _tokens(first, second, text)
    sizes = first.config.vocab_size, second.config.vocab_size
    rows = min(sizes)
    note = f"{sizes[0]:,} and {sizes[1]:,} embedding rows; the first {rows:,} are compared"
    notes = (note,) if sizes[0] != sizes[1] else ()
    logits = [compute_logits(each, tokens)[:, :rows] for each in (first, second)]  # one model in memory at a time
    differences = (logits[1] - logits[0]).abs()  # [tokens, vocabulary]
    beyond = (differences.amax(-1) > tolerance).nonzero().flatten()
    layouts, largest, mean = (first.layout, second.layout), float(differences.max()), float(differences.mean())
    position = int(beyond[0]) if len(beyond) else None
    agreement = float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    return Verification(layouts, inputs, len(tokens), largest, mean, position, agreement, tolerance, notes)


def compare_tensors(a: str | Path, b: str | Path, config: str | Path | None = None) -> Iterator[TensorDifference]:
    """Compares two checkpoints tensor by tensor in fp32, one pair at a time; raises like [`verify`]."""
    first, second = _open(a, config), _open(b, config)
    for name in dict.fromkeys([*first.tensors, *second.tensors]):
        if name not in first.tensors or name not in second.tensors:
            only = a if name in first.tensors else b
            yield TensorDifference(name, False, math.inf, math.inf, f"only in {only}")
            continue
        kinds = [(list(each.tensors[name].shape), str(each.tensors[name].dtype)[6:]) for each in (first, second)]
        what = " ".join(map(str, kinds[0])) if kinds[0] == kinds[1] else f"{kinds[0]} and {kinds[1]}"
        if kinds[0][0] != kinds[1][0]:
            yield TensorDifference(name, False, math.inf, math.inf, what)
            continue
        one, other = first.load(name), second.load(name)
        difference = (other.float() - one.float()).abs()
        is_same = kinds[0] == kinds[1] and one.equal(other)
        yield TensorDifference(name, is_same, float(difference.max()), float(difference.mean()), what)


def _open(source: str | Path, config: str | Path | None) -> Checkpoint:
    """Opens a checkpoint; `config` is used if it cannot be opened without it."""
    try:
        return open_checkpoint(source)
    except InputError:
        if config is None:
            raise
        return open_checkpoint(source, config)


def compute_logits(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Computes the logits `[tokens, vocabulary]` of a checkpoint in fp32 by stock `LlamaForCausalLM`.

    Raises:
        InputError: if they are not all finite.
    """
    state = {name: checkpoint.load(name, torch.float32) for name in checkpoint.tensors}
    config = checkpoint.config
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    del state
    with torch.no_grad():
        logits = model(tokens[None], use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        raise InputError(f"{checkpoint.path}: its logits are not finite. Check where the weights come from")
    return logits


def _tokens(first: Checkpoint, second: Checkpoint, text: str | Path | None) -> tuple[torch.Tensor, str]:
    """Returns at most 512 ids that both models have rows for, and a description of them."""
    length = min(MAX_TOKENS, first.config.max_position_embeddings, second.config.max_position_embeddings)
    rows = min(first.config.vocab_size, second.config.vocab_size)
    source = first if first.tokenizer else second
    tokenizer = source.load_tokenizer()
    if tokenizer is None:
        if text is not None:
            raise InputError(f"--text {text}: neither checkpoint has a tokenizer. Omit --text to use random ids")
        random_ids = torch.randint(rows, (length,), generator=torch.Generator().manual_seed(0))
        return random_ids, "random ids, since neither has a tokenizer"
    ids = sample_tokens(tokenizer, length, text)
    name = text or "the bundled text"
    if len(ids) < 2 or max(ids) >= rows:
        found = f"{len(ids)} tokens with ids up to {max(ids, default=0)}"
        rule = f"At least 2 tokens with ids below {rows} are needed; {source.tokenizer} may belong to another model"
        raise InputError(f"{name}: {found}. {rule}")
    return torch.tensor(ids), f"{name}, tokenizer of {source.tokenizer}"


def sample_tokens(tokenizer: PreTrainedTokenizerBase, length: int, text: str | Path | None = None) -> list[int]:
    """Returns the first ids of a text, by default a bundled one, with begin-of-sequence if the tokenizer has one."""
    ids = encode_text(tokenizer, read_text(Path(text or _SAMPLE)))
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*first, *ids][:length]


def check_sanity(checkpoint: Checkpoint) -> float:
    """Returns the loss per token on the bundled text, in nats.

    It detects weights with rows in a wrong order, which have the right shapes.

    Raises:
        InputError: if the loss is not below the entropy of the text's token frequencies, or there is no tokenizer.
    """
    if checkpoint.tokenizer is None:
        raise InputError(f"--sanity: {checkpoint.path} has no tokenizer. Add tokenizer.model or tokenizer.json")
    tokens, _ = _tokens(checkpoint, checkpoint, None)
    logits = compute_logits(checkpoint, tokens)
    loss = float(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]))
    counts = torch.bincount(tokens[1:]).float()
    entropy = float(torch.distributions.Categorical(counts).entropy())
    if not loss < entropy:
        found = f"a loss of {loss:.3f} nats per token on the bundled text; token frequencies alone give {entropy:.3f}"
        cause = f"The rows are not in the order of {checkpoint.layout}, or the model is untrained. Nothing was written"
        raise InputError(f"--sanity: {checkpoint.path}: {found}. {cause}")
    return loss
