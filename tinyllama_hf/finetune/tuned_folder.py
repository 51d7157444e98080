"""The folder of a fine-tuned model: a plain Llama with chat template, held-out data and provenance."""

import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel

from .. import provenance
from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError
from ..files import new_files, read_json, replace_folder, write_json
from ..inference.load import load_stock
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..tokenization_tinyllama import tokenizer_fingerprint
from .conversations import HELD_OUT_FILE
from .run_checkpoints import RunState
from .trainer import OpenedRun, TrainedModel, add_token_rows


ADAPTER_FOLDER = "adapter"
_RECORD_FILE = "provenance.json"  # written last: the run is finished


def check_run_folder(output: Path, overwrite: bool) -> Path:
    """Checks that a run can be started or resumed in a folder.

    Raises:
        InputError: if it holds something else, or a finished model that is not to be replaced.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir {output} is a file. Choose a folder")
    if not output.exists() or not any(output.iterdir()):
        return output
    if not (output / HELD_OUT_FILE).is_file():
        raise InputError(f"output_dir {output} is not empty, and it is not a fine-tuned model. Choose another folder")
    if (output / _RECORD_FILE).is_file() and not overwrite:
        raise InputError(
            f"output_dir {output} holds a finished model. Choose another folder, or pass --overwrite to replace it"
        )
    return output


def write_tuned_folder(
    run: OpenedRun,
    trained: TrainedModel,
    state: RunState,
    data_record: dict[str, Any],
    score: Callable[[PreTrainedModel], dict[str, float]],
    before: dict[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Writes the finished model into the folder of its run.

    An adapter is saved to `adapter/`, and merged into the plain weights of the base.

    Args:
        run (`OpenedRun`): the run.
        trained (`TrainedModel`): the trained model.
        state (`RunState`): has the losses.
        data_record (`dict`): describes the data in `provenance.json`.
        score (`Callable`): returns `held_out_loss`, and possibly more, of a model. Called for the finished model and
            for the base model, which are loaded for it as others load them.
        before (`dict[str, float]`, *optional*): the scores of the base model, if they are known.

    Returns:
        Each score `before` and `after` training.

    Raises:
        InputError: if that loss is not finite.
    """
    with new_files(run.output, last=_RECORD_FILE) as folder:
        _save_weights(run, trained, folder)
        run.tokenizer.save_pretrained(folder)
        after = score(load_stock(folder)[0])
        if not math.isfinite(after["held_out_loss"]):
            raise InputError(
                f"training.learning_rate: {run.config.training.learning_rate}: after training, the loss of held-out "
                "data is not finite. Lower it"
            )
        before = before or score(add_token_rows(load_stock(run.base)[0], len(run.tokenizer)))
        scores = {name: {"before": before[name], "after": value} for name, value in after.items()}
        record = provenance.collect(
            **_record(run),
            **data_record,
            steps=max(state.losses),
            kept_step=_kept_step(run, state),
            **scores,
        )
        write_json(folder / _RECORD_FILE, record)
    return scores


def _kept_step(run: OpenedRun, state: RunState) -> int:
    return state.best_step if run.config.evaluation.keep == "best" else max(state.losses)


def _save_weights(run: OpenedRun, trained: TrainedModel, folder: Path) -> None:
    from peft import PeftModel

    if isinstance(trained, PeftModel):
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".adapter") as temporary:
            adapter = Path(temporary) / ADAPTER_FOLDER
            trained.save_pretrained(str(adapter))
            (adapter / "README.md").unlink()  # an empty template
            run.tokenizer.save_pretrained(adapter)
            base = add_token_rows(load_stock(run.base, "cpu")[0], len(run.tokenizer))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT's (0.21.2), about names in transformers
                merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
            replace_folder(adapter, run.output / ADAPTER_FOLDER)
    else:
        merged = trained
    assert isinstance(merged, LlamaForCausalLM)
    merged.config.pad_token_id = None  # or the next load would zero and freeze that row of the embedding
    plain = TinyLlamaForCausalLM(TinyLlamaConfig.from_llama(merged.config))
    plain.load_state_dict(merged.state_dict())
    plain.config.use_cache = True
    plain.config.eos_token_id = run.tokenizer.eos_token_id
    plain.generation_config.eos_token_id = run.tokenizer.eos_token_id
    plain.generation_config.pad_token_id = run.tokenizer.pad_token_id
    plain.save_pretrained(folder)


def _record(run: OpenedRun) -> dict[str, Any]:
    """Returns the entries of `provenance.json` in addition to code, libraries and machine."""
    base_record = run.base / _RECORD_FILE
    return {
        "base_model": {
            "path": run.config.model.path,
            "sha256": provenance.weight_hashes(run.base),
            **({"provenance": read_json(base_record)} if base_record.is_file() else {}),
        },
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
    }
