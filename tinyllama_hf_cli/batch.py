"""`tinyllama-hf generate --input`: many prompts from a file."""

import sys
from pathlib import Path
from typing import Any

import typer

from .loading import note


_MOST_LINES = 10  # that a message names


def generate_file(
    model: str,
    source: Path,
    output: Path | None,
    batch_size: int | None,
    sampling: Any,
    seed: int | None,
    draft: str | None,
    adapter: str | None,
    weights: dict[str, str],
    load: Any,
) -> None:
    """Generates for every line of a file.

    `load` gives model, tokenizer and draft, and is called once all is checked that can be without; `weights` are the other
    options that it looks at.
    """
    import time

    from tinyllama_hf.batch.generate_many import DEFAULT_BATCH_SIZE, check_options
    from tinyllama_hf.batch.job import open_job
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.planning.inference_memory import check_fits

    if output is None:
        raise InputError(f"--output: is needed with --input {source}; name the file to write")
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
            print("interrupted; what was done is kept, the same command goes on", file=sys.stderr)
            raise typer.Exit(130) from None
        print(_summary(job, num_tokens, time.perf_counter() - began))
        if helper and helper.statistics:
            note(str(helper.statistics))
    _report_bad_lines(job, source)


def _summary(job: Any, num_tokens: int, seconds: float) -> str:
    continued, before = len(job.pending), len(job.prompts.prompts) - len(job.pending)
    return (
        f"wrote {job.output}: {continued:,} prompts continued{f' ({before:,} before)' if before else ''}, "
        f"{num_tokens:,} new tokens in {seconds:.1f} s, {num_tokens / seconds:,.0f} tokens/s"
    )


def _report_bad_lines(job: Any, source: Path) -> None:
    from tinyllama_hf.errors import InputError

    prompts, bad = job.prompts
    if not bad:
        return
    lines = [f"  {line.error}" for line in bad[:_MOST_LINES]]
    lines += [f"  and {len(bad) - _MOST_LINES:,} more"] if len(bad) > _MOST_LINES else []
    raise InputError(
        f"--input {source}: {len(bad):,} of {len(bad) + len(prompts):,} lines cannot be continued, and have an error in their "
        f"rows of {job.output}; the others are done\n" + "\n".join(lines)
    )
