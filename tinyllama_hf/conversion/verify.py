"""Proves that two checkpoints compute the same, whatever layouts they are in; and that one computes anything sensible."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM

from ..errors import InputError
from ..text import read_text
from ..tokenization_tinyllama import encode_text
from .checkpoint import Checkpoint
from .reading.recognize import open_checkpoint


MAX_TOKENS = 512
TOLERANCE = 1e-5
_SAMPLE = Path(__file__).with_name("sample.txt")


class Verification(NamedTuple):
    """How far the logits of two checkpoints lie apart on the same tokens.

    `first_position` is that of the first token whose logits differ by more than the tolerance, `None` if none does.
    `argmax_agreement` is the share of positions where both find the same token most likely.
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
    """One tensor of two checkpoints; `largest` and `mean` of the absolute differences, infinite for other shapes."""

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
    """Compares the logits of two checkpoints of any two layouts, each computed in fp32, on the same tokens.

    Args:
        a, b (`str` or `Path`): files, folders, released names or Hub ids.
        text (`str` or `Path`, *optional*): a text file; its first 512 tokens are taken. Without it a bundled text, or
            random ids where neither checkpoint brings a tokenizer.
        tolerance (`float`, *optional*, defaults to 1e-5): what a logit may differ by.
        config (`str` or `Path`, *optional*): for the checkpoints that bring no configuration.

    Raises:
        InputError: if one cannot be read, or they cannot be compared.
    """
    if not tolerance >= 0:
        raise InputError(f"--tolerance {tolerance}: must be 0 or more")
    first, second = _open_both(a, b, config)
    tokens, inputs = _tokens(first, second, text)
    notes = []
    rows = min(first.config.vocab_size, second.config.vocab_size)
    if first.config.vocab_size != second.config.vocab_size:
        notes.append(
            f"{first.config.vocab_size:,} and {second.config.vocab_size:,} embedding rows: the first {rows:,} are compared"
        )
    logits = [logits_of(each, tokens)[:, :rows] for each in (first, second)]  # one model in memory at a time
    differences = (logits[1] - logits[0]).abs()  # [tokens, vocabulary]
    beyond = (differences.amax(-1) > tolerance).nonzero().flatten()
    agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    return Verification(
        (first.layout, second.layout), inputs, len(tokens), float(differences.max()), float(differences.mean()),
        int(beyond[0]) if len(beyond) else None, float(agreement), tolerance, tuple(notes),
    )  # fmt: skip


def compare_tensors(a: str | Path, b: str | Path, config: str | Path | None = None) -> Iterator[TensorDifference]:
    """Compares two checkpoints tensor by tensor, in fp32, reading one pair at a time; errors as of [`verify`]."""
    first, second = _open_both(a, b, config)
    for name in dict.fromkeys([*first.tensors, *second.tensors]):
        if name not in first.tensors or name not in second.tensors:
            only = a if name in first.tensors else b
            yield TensorDifference(name, False, math.inf, math.inf, f"only in {only}")
            continue
        kinds = [(list(each.tensors[name].shape), str(each.tensors[name].dtype)[6:]) for each in (first, second)]
        what = " ".join(map(str, kinds[0])) if kinds[0] == kinds[1] else f"{kinds[0]} against {kinds[1]}"
        if kinds[0][0] != kinds[1][0]:
            yield TensorDifference(name, False, math.inf, math.inf, what)
            continue
        one, other = first.load(name), second.load(name)
        difference = (other.float() - one.float()).abs()
        yield TensorDifference(name, kinds[0] == kinds[1] and one.equal(other), float(difference.max()),
                               float(difference.mean()), what)  # fmt: skip


def _open_both(a: str | Path, b: str | Path, config: str | Path | None) -> tuple[Checkpoint, Checkpoint]:
    """Opens two checkpoints; the configuration is for whichever cannot be opened without."""
    found = []
    for source in (a, b):
        try:
            found.append(open_checkpoint(source))
        except InputError:
            if config is None:
                raise
            found.append(open_checkpoint(source, config))
    return found[0], found[1]


def logits_of(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """The logits `[tokens, vocabulary]` of a checkpoint, computed in fp32 by stock `LlamaForCausalLM`.

    Raises:
        InputError: if they are not all finite, so that nothing could be said of them.
    """
    model = load_model(checkpoint)
    with torch.no_grad():
        logits = model(tokens[None], use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        raise InputError(f"{checkpoint.path}: its logits are not finite; its weights are no trained model's")
    return logits


def load_model(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """The whole model in memory, in fp32 and in evaluation mode."""
    state = {name: checkpoint.load(name, torch.float32) for name in checkpoint.tensors}
    return LlamaForCausalLM.from_pretrained(
        None, config=checkpoint.config, state_dict=state, dtype=torch.float32
    ).eval()


def _tokens(first: Checkpoint, second: Checkpoint, text: str | Path | None) -> tuple[torch.Tensor, str]:
    """At most 512 ids that both have rows for, and what they are."""
    length = min(MAX_TOKENS, first.config.max_position_embeddings, second.config.max_position_embeddings)
    rows = min(first.config.vocab_size, second.config.vocab_size)
    source = first if first.tokenizer else second
    tokenizer = source.load_tokenizer()
    if tokenizer is None:
        if text is not None:
            raise InputError(f"--text {text}: neither checkpoint brings a tokenizer; leave it out for random ids")
        ids = torch.randint(rows, (length,), generator=torch.Generator().manual_seed(0))
        return ids, "random ids, since neither brings a tokenizer"
    ids = encode_text(tokenizer, read_sample(text))
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    ids = ids[:length]
    if len(ids) < 2 or max(ids) >= rows:
        raise InputError(
            f"{text or 'the bundled text'}: gives {len(ids)} tokens up to id {max(ids, default=0)}, but at least 2 are needed, "
            f"below {rows}; the tokenizer {source.tokenizer} may be of another model"
        )
    return torch.tensor(ids), f"{text or 'the bundled text'}, tokenizer of {source.tokenizer}"


def read_sample(text: str | Path | None = None) -> str:
    """A text file, or the bundled text.

    Raises:
        InputError: if there is no such file, or it is not UTF-8.
    """
    return read_text(_SAMPLE if text is None else Path(text))


def check_sanity(checkpoint: Checkpoint) -> float:
    """The loss on the next token of the bundled text, in nats: what a wrong order of rows, which no shape shows, destroys.

    Raises:
        InputError: if the model knows no more of the text than how often each token comes in it (the entropy of the text's own
            tokens), or the checkpoint brings no tokenizer.
    """
    if checkpoint.tokenizer is None:
        raise InputError(
            f"--sanity: {checkpoint.path} brings no tokenizer; put tokenizer.model or tokenizer.json beside it"
        )
    tokens, _ = _tokens(checkpoint, checkpoint, None)
    logits = logits_of(checkpoint, tokens)
    loss = float(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]))
    counts = torch.bincount(tokens[1:]).float()
    entropy = float(torch.distributions.Categorical(counts).entropy())
    if not loss < entropy:
        raise InputError(f"--sanity: {checkpoint.path}: a loss of {loss:.3f} nats a token on the bundled text, where the frequencies "
                         f"of its tokens alone give {entropy:.3f}: the rows are in another order than {checkpoint.layout} says, "
                         "or the model was hardly trained; nothing was written")  # fmt: skip
    return loss
