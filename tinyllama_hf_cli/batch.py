"""`tinyllama-hf generate --input`: generation for a file of prompts."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .loading import note


if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tinyllama_hf.batch.job import BatchJob
    from tinyllama_hf.decoding.proposals import Proposer
    from tinyllama_hf.inference.options import Sampling


_MAX_SHOWN_LINES = 10


def generate_file(
    model: str,
    source: Path,
    output: Path | None,
    batch_size: int | None,
    sampling: "Sampling",
    seed: int | None,
    draft: str | None,
    adapter: str | None,
    weights: dict[str, str],
    load: "Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast, Proposer | None]]",
) -> None:
    """Generates for every line of a file.

    `load` returns model, tokenizer and draft. It is called after everything has been checked that needs no weights.
    `weights` are the options of `load` that the results depend on.
    """
    import time

    from tinyllama_hf.batch.generate_many import DEFAULT_BATCH_SIZE, check_options
    from tinyllama_hf.batch.job import open_job
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.planning.inference_memory import check_fits

    if output is None:
        raise InputError(f"--output: is required with --input {source}. Give the file to write")
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    check_options(batch_size, seed)
    job = open_job(source, output, model, draft, adapter, sampling, seed=seed, **weights)
    if job.is_finished:
        print(f"{output}: was finished already")
    else:
        prompts = job.prompts.prompts
        loaded, tokenizer, helper = load()
        check_fits(loaded, min(batch_size, len(prompts)), max(len(p.ids) + p.max_new_tokens for p in prompts), helper)
        began = time.perf_counter()
        try:
            num_tokens = job.run(loaded, tokenizer, batch_size, sampling, seed, helper)
        except KeyboardInterrupt:
            print("interrupted; finished rows are kept, run the same command to resume", file=sys.stderr)
            raise typer.Exit(130) from None
        print(_summary(job, num_tokens, time.perf_counter() - began))
        if helper and helper.statistics:
            note(str(helper.statistics))
    _report_bad_lines(job, source)


def _summary(job: "BatchJob", num_tokens: int, seconds: float) -> str:
    continued, before = len(job.pending), len(job.prompts.prompts) - len(job.pending)
    return (
        f"wrote {job.output}: {continued:,} prompts continued{f' ({before:,} before)' if before else ''}, "
        f"{num_tokens:,} new tokens in {seconds:.1f} s, {num_tokens / seconds:,.0f} tokens/s"
    )


def _report_bad_lines(job: "BatchJob", source: Path) -> None:
    from tinyllama_hf.errors import InputError

    prompts, bad = job.prompts
    if not bad:
        return
    lines = [f"  {line.error}" for line in bad[:_MAX_SHOWN_LINES]]
    lines += [f"  and {len(bad) - _MAX_SHOWN_LINES:,} more"] if len(bad) > _MAX_SHOWN_LINES else []
    raise InputError(
        f"--input {source}: {len(bad):,} of {len(bad) + len(prompts):,} lines have no valid prompt. Their rows of "
        f"{job.output} have an error; the others are finished\n" + "\n".join(lines)
    )
