"""The cache of reference log-probabilities: pairs on the disk, next to which TRL keeps the values of their replies.

TRL (1.16) writes them to the folder of the data set, into a file that is named by the fingerprint of the data and the
hash of the weights. Here that folder is the same whenever the values are the same, so that a later run finds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import require
from ..files import new_folder
from ..provenance import file_sha256, fingerprint
from .config import PreferenceConfig
from .rendered_pairs import RenderedPair
from .trainer import processes


if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("train", "held_out")


@dataclass(frozen=True)
class ReferenceCache:
    """The folder of the pairs of a run, in the cache of `datasets` (set by `HF_HOME` or `HF_DATASETS_CACHE`)."""

    folder: Path

    @property
    def is_complete(self) -> bool:
        """Whether the values of all pairs are known."""
        return all(any((self.folder / part).glob("cache-*.arrow")) for part in PARTS)

    @property
    def num_bytes(self) -> int:
        """The size of all files in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def data_sets(self, *parts: Sequence[RenderedPair]) -> list["Dataset"]:
        """Returns the pairs of each part as a data set on the disk. All processes must call it."""
        from datasets import Dataset, disable_progress_bars, load_from_disk

        disable_progress_bars()  # of writing; TRL's bar of the forward passes is not affected
        with processes().main_process_first():
            for name, pairs in zip(PARTS, parts, strict=True):
                if not (self.folder / name).is_dir():
                    with new_folder(self.folder / name) as folder:
                        Dataset.from_list([pair._asdict() for pair in pairs]).save_to_disk(folder)
        return [load_from_disk(self.folder / name) for name in PARTS]


def find_cache(config: PreferenceConfig, base: Path, *parts: Sequence[RenderedPair]) -> ReferenceCache:
    """Returns the cache for everything that decides the reference log-probabilities.

    With an adapter, TRL's hash of the weights includes the initial adapter, so its settings and the seed are included.

    Args:
        config (`PreferenceConfig`): the complete recipe.
        base (`Path`): folder of the base model, which is the reference.
        parts (`Sequence[RenderedPair]`): the pairs for training and those held out.
    """
    files = [*sorted(base.glob("*.safetensors")), base / "config.json"]
    kind, seed = config.adapter.kind, config.training.seed
    key = fingerprint(
        {
            "pairs": parts,
            "model": [file_sha256(file) for file in files],
            "new_tokens": config.model.new_tokens,
            "precision": config.training.precision,
            "device": processes().device.type,
            "adapter": None if kind == "full" else {**config.adapter.model_dump(mode="json"), "seed": seed},
        }
    )
    datasets = require("datasets", "finetune", "preference tuning")
    return ReferenceCache(Path(datasets.config.HF_DATASETS_CACHE) / "tinyllama_hf_references" / key[:16])
