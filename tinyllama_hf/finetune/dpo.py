"""Preference tuning with TRL's `DPOTrainer`, on our rendering of conversations."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from ..errors import InputError
from .config import PreferenceConfig
from .conversation_sources import SourceSummary
from .opened_base import open_base
from .preference_scores import log_probabilities, preference_scores
from .preferences import read_preferences
from .reference_cache import ReferenceCache, find_cache
from .rendered_pairs import RenderedPair, render_pairs, split_pairs, write_pairs
from .run_checkpoints import RunState
from .trainer import OpenedRun, TrainedModel, processes, rows_per_step, run_settings, train
from .training_order import TrainingOrder, training_steps
from .tuned_folder import write_tuned_folder


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig

REFERENCE_BATCH_SIZE = 8  # pairs; the same in all runs, so that the reference does not depend on batch settings

_SCORES = {"loss": "loss", "accuracy": "accuracy", "likelier": "share with the chosen reply likelier"}


@dataclass(frozen=True)
class PreferenceRun(OpenedRun):
    """A run on preferences.

    Attributes:
        train (`list[RenderedPair]`): pairs to train on.
        held_out (`list[RenderedPair]`): pairs to evaluate on.
        references (`ReferenceCache`): where the log-probabilities of their replies by the base model are kept.
        sources (`list[SourceSummary]`): what was read.
        used (`Counter[int]`): number of pairs by source.
        num_dropped (`int`): pairs that are longer than `data.max_length`.
    """

    config: PreferenceConfig
    train: list[RenderedPair]
    held_out: list[RenderedPair]
    references: ReferenceCache
    sources: list[SourceSummary]
    used: Counter[int]
    num_dropped: int

    def record(self) -> dict[str, Any]:
        """Returns the counts of pairs and the loss, for `provenance.json`."""
        return {
            "preferences": {
                "source": ", ".join(source.path for source in self.config.data.preferences),
                "train": len(self.train),
                "held_out": len(self.held_out),
                "dropped": self.num_dropped,
            },
            "preference": self.config.preference.model_dump(),
        }


class PreferenceTraining:
    """A run once its trainer is created, which provides the reference log-probabilities."""

    def __init__(self, run: PreferenceRun):
        self.run = run

    def make_trainer(
        self,
        arguments: dict[str, Any],
        model: PreTrainedModel,
        adapter: "LoraConfig | None",
        callbacks: list[TrainerCallback],
    ) -> Trainer:
        """Returns TRL's trainer, which computes the reference before it. See `MakeTrainer`."""
        from trl import DPOConfig, DPOTrainer

        class TokenizedDPOTrainer(DPOTrainer):
            # TRL (1.16) cannot skip this for pairs, and would tokenize them with the tokenizer's template.
            def _prepare_dataset(self, dataset: "Dataset", *arguments: Any) -> "Dataset":
                return dataset

        run = self.run
        training, held_out = run.references.data_sets(run.train, run.held_out)
        self.trainer = TokenizedDPOTrainer(
            model=model,
            args=DPOConfig(
                **arguments,
                beta=run.config.preference.beta,
                loss_type=[run.config.preference.loss],
                max_length=None,  # no truncation: longer pairs were refused or dropped
                disable_dropout=False,  # only adapter.dropout, which is 0 unless the recipe sets it
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=REFERENCE_BATCH_SIZE,
            ),
            train_dataset=training,
            eval_dataset=held_out,
            processing_class=run.tokenizer,
            peft_config=adapter,
            callbacks=callbacks,
        )
        set_seed(run.config.training.seed)  # computing the reference draws random numbers, and finding it does not
        # The reference is computed once per pair; now the pairs are put into the order of training.
        training, held_out = (
            cast("Dataset", part) for part in (self.trainer.train_dataset, self.trainer.eval_dataset)
        )
        self.trainer.train_dataset = training.select(list(chain.from_iterable(run.order.rows())))
        values = [list(held_out[name]) for name in ("ref_chosen_logps", "ref_rejected_logps")]
        self.reference = torch.tensor(values, dtype=torch.float64).T
        return self.trainer

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the scores of the held-out pairs. All processes must call it."""
        if self.trainer.state.global_step == 0:
            return self.scores(self.reference)
        state = processes()
        own = slice(state.process_index, None, state.num_processes)
        policy = torch.zeros_like(self.reference, device=model.device)
        policy[own] = self.log_probabilities(model, self.run.held_out[own]).to(model.device)
        if state.num_processes > 1:
            dist.all_reduce(policy)
        return self.scores(policy.cpu())

    def log_probabilities(self, model: PreTrainedModel, pairs: list[RenderedPair]) -> torch.Tensor:
        """Returns those of a model in the precision of the run, as for the reference."""
        with torch.autocast(model.device.type, torch.bfloat16, self.run.config.training.precision == "bf16"):
            return log_probabilities(model.eval(), pairs)

    def scores(self, policy: torch.Tensor) -> dict[str, float]:
        """Returns the scores of the held-out pairs, for their log-probabilities."""
        return preference_scores(self.run.held_out, policy, self.reference, self.run.config.preference)


def tune_preferences(
    run: PreferenceRun, overwrite: bool = False, after_checkpoint: Callable[[Path], None] | None = None
) -> None:
    """Trains on preferences, and writes a plain Llama folder with chat template and provenance.

    Args:
        run (`PreferenceRun`): from [`open_preference_run`].
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier fine-tuned model in `output_dir`.
        after_checkpoint (`Callable`, *optional*): called with the folder of the run.

    Raises:
        InputError, Stopped, DivergedError: as in [`train`].
    """
    training = PreferenceTraining(run)

    def named(scores: dict[str, float]) -> dict[str, float]:
        return {name.replace("validation", "held_out"): value for name, value in scores.items()}

    def score(model: PreTrainedModel) -> dict[str, float]:
        return named(training.scores(training.log_probabilities(model, run.held_out)))

    def finish(model: TrainedModel, state: RunState) -> None:
        before = named(training.scores(training.reference))
        scores = write_tuned_folder(run, model, state, run.record(), score, before)
        for name, what in _SCORES.items():
            values = scores[f"held_out_{name}"]
            print(f"held-out {what}: {values['before']:.3f} before training, {values['after']:.3f} after")

    train(run, training.make_trainer, training.evaluate, finish, overwrite, after_checkpoint)


def open_preference_run(config: PreferenceConfig, overwrite: bool = False) -> PreferenceRun:
    """Checks a recipe and loads tokenizer and preferences. Writes nothing.

    Raises:
        InputError: if model, template, preferences or output cannot be used, or a package is not installed.
    """
    opened = open_base(config, overwrite)
    config, tokenizer, max_length = opened.config, opened.tokenizer, opened.max_length
    data = read_preferences(config.data.preferences, config.data.invalid)
    parts = split_pairs(data.pairs, config.data.validation_fraction)
    drop = config.data.too_long == "drop"
    (training, kept), (held_out, kept_out) = (render_pairs(tokenizer, part, max_length, drop) for part in parts)
    if not training or not held_out:
        raise InputError(f"data.max_length: {max_length} drops all pairs. Raise it")
    longest = config.data.max_length or max(max(pair.lengths()) for pair in training + held_out)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": longest})})
    lengths, section = [sum(pair.lengths()) for pair in training], config.training
    weights = [source.weight for source in config.data.preferences]
    sizes = Counter(pair.source for pair in kept)
    counts = [sizes[number] for number in range(len(weights))]
    steps = training_steps(counts, weights, section.epochs, section.sequences_per_step, section.seed)
    return PreferenceRun(
        config=config,
        output=opened.output,
        base=opened.base,
        tokenizer=tokenizer,
        template=opened.template,
        order=TrainingOrder(steps, lengths, rows_per_step(config), packing=False),
        settings=run_settings(config, opened.base, tokenizer, [training, held_out]),
        held_out_rows=write_pairs(kept_out),
        train=training,
        held_out=held_out,
        references=find_cache(config, opened.base, training, held_out),
        sources=data.sources,
        used=sizes + Counter(pair.source for pair in kept_out),
        num_dropped=len(data.pairs) - len(training) - len(held_out),
    )
