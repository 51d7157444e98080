"""Caches and rows at fixed addresses, with the graphs that were recorded over them; kept for the next call."""

import math
import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..devices import format_bytes
from ..errors import InputError
from .graphs import Graphs, Recorder, describe_weights
from .ragged_cache import RaggedModel
from .row_state import RowState
from .rows import row_bucket


_NUM_EOS = 8  # room for end-of-sequence tokens; unused entries are -1, which no token equals


class Size(NamedTuple):
    """What a batch needs.

    Attributes:
        rows (`int`): number of rows.
        slots (`int`): slots per row, from [`slots_of`].
        draws (`int`): random numbers per row and purpose; 0 for greedy decoding.
        probabilities (`tuple[int, int]`): number of drafted tokens that are sampled, and the vocabulary size.
        eos (`int`): number of end-of-sequence tokens.
    """

    rows: int
    slots: int
    draws: int
    probabilities: tuple[int, int]
    eos: int

    def allocated(self) -> "Size":
        """Returns the size of the memory that is allocated."""
        eos, draws = max(self.eos, _NUM_EOS), self.slots if self.draws else 0
        return self._replace(rows=row_bucket(self.rows), draws=draws, eos=eos)

    def fits(self, other: "Size") -> bool:
        """Whether a batch of this size fits into memory of another size."""
        numbers = (self.rows, self.slots, self.draws, self.eos)
        available = (other.rows, other.slots, other.draws, other.eos)
        room = all(a <= b for a, b in zip(numbers, available, strict=True))
        # Steps accept drafted tokens by their distributions wherever there are some.
        return room and self.probabilities == other.probabilities


class FixedMemory:
    """Memory of one batch: rows, a cache for each model, and the graphs.

    Args:
        readers (`Sequence[RaggedModel]`): the target, and the draft if it is a model; each has read something.
        size (`Size`): see [`Size.allocated`].
        recorder (`Recorder`): records steps.
    """

    def __init__(self, readers: Sequence[RaggedModel], size: Size, recorder: Recorder):
        device = readers[0].model.device
        _check_room(readers, size, device)
        eos = torch.full((size.eos,), -1, device=device)
        draws = torch.zeros(size.rows, 3, size.draws, dtype=torch.float64, device=device) if size.draws else None
        self.size = size
        self.state = RowState.empty(size.rows, size.slots, draws, eos)
        if size.probabilities[0]:
            self.state.probabilities = torch.zeros(size.rows, *size.probabilities, device=device)
        self.caches = [reader.cache.fixed(size.rows, size.slots) for reader in readers]
        self.graphs = Graphs(recorder, self.state)
        self._recorded_for = _description(readers)
        self._owner: weakref.ref[object] | None = None

    def serves(self, readers: Sequence[RaggedModel], size: Size) -> bool:
        """Whether it is free, large enough, and its graphs belong to these models as they are now."""
        is_free = self._owner is None or self._owner() is None
        return is_free and size.fits(self.size) and self._recorded_for == _description(readers)

    def lend(self, owner: object) -> None:
        """Reserves it for an owner, until that is gone or [`give_back`] is called."""
        self._owner = weakref.ref(owner)

    def give_back(self) -> None:
        """Makes it available to the next owner."""
        self._owner = None


def _check_room(readers: Sequence[RaggedModel], size: Size, device: torch.device) -> None:
    """Refuses caches that do not fit the free memory of a GPU.

    Raises:
        InputError: with the sizes.
    """
    needed = sum(reader.cache.fixed_bytes(size.rows, size.slots) for reader in readers)
    free = free_bytes(device)
    if needed > free:
        raise InputError(
            f"a batch of {size.rows} rows of {size.slots:,} tokens: its keys and values take {format_bytes(needed)}, "
            f"and {format_bytes(free)} of {device} are free. Generate for fewer prompts at a time, or lower "
            "max_new_tokens"
        )


def free_bytes(device: torch.device) -> float:
    """Returns the memory of a GPU that torch can allocate; no limit on other devices."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _description(readers: Sequence[RaggedModel]) -> list[Hashable]:
    """Describes what graphs depend on, besides the contents of tensors."""
    return [(reader.is_compiled, describe_weights(reader.model)) for reader in readers]


# The latest memory of each target. It is large, so there is one: the next call most likely has the same draft.
_kept: weakref.WeakKeyDictionary[PreTrainedModel, FixedMemory] = weakref.WeakKeyDictionary()


def borrow(owner: object, readers: Sequence[RaggedModel], size: Size, recorder: Recorder) -> FixedMemory:
    """Returns memory for a batch: the kept one, or a new one in its place.

    Args:
        owner (`object`): see [`FixedMemory.lend`].
        readers (`Sequence[RaggedModel]`): see [`FixedMemory`].
        size (`Size`): of the batch.
        recorder (`Recorder`): records steps of new memory.
    """
    target = readers[0].model
    memory = _kept.pop(target, None)
    if memory is None or not memory.serves(readers, size):
        del memory  # its memory can be used again
        memory = FixedMemory(readers, size.allocated(), recorder)
    memory.lend(owner)
    _kept[target] = memory
    return memory


def release(model: PreTrainedModel) -> None:
    """Frees the caches and graphs that are kept for a target."""
    _kept.pop(model, None)
