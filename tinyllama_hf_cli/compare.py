"""`tinyllama-hf compare`."""

from pathlib import Path
from typing import Annotated

import typer

from .outputs import check_output_file


def compare_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Score files of `eval tasks`, for all their models; FILE:MODEL for one of them; or rows of the "
            "published table. All are compared with the first model.",
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="Metric for all tasks: acc, acc_norm, bits_per_byte ...; default: that of each task."),
    ] = None,
    different_protocols: Annotated[
        bool,
        typer.Option("--different-protocols", help="Allow different protocols, and list the differences."),
    ] = False,
    fail_on_regression: Annotated[
        bool,
        typer.Option("--fail-on-regression", help="Exit with status 1 if a model is worse than the first, for CI."),
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write, with unrounded numbers.")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap samples per interval.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Is B better than A? Differences between task scores, with intervals, tests on the items that both models
    answered, and the smallest difference that this number of items could show.

    Example: tinyllama-hf compare old/commonsense.json new/commonsense.json --fail-on-regression

    Example: tinyllama-hf compare runs/demo/pretrain/commonsense.json --metric bits_per_byte

    Example: tinyllama-hf compare step-1195k-2.5T step-1431k-3T
    """
    from tinyllama_hf.evaluation.comparison.compared_models import find_compared_models
    from tinyllama_hf.evaluation.comparison.comparison_text import (
        comparison_json,
        comparison_lines,
        comparison_markdown,
    )
    from tinyllama_hf.evaluation.comparison.score_comparison import check_comparison, compare_models
    from tinyllama_hf.files import write_json, write_text
    from tinyllama_hf.progress import progress_bar

    _check_outputs(markdown, json)
    found = find_compared_models(models)
    check_comparison(found, metric, different_protocols, resamples, seed)
    with progress_bar("Comparing", "models", len(found) - 1) as update:
        comparisons = compare_models(
            found, metric, different_protocols, resamples, seed, advance=lambda: update(advance=1)
        )
    for line in comparison_lines(comparisons, resamples, seed):
        print(line)
    for path in filter(None, (markdown, json)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if markdown:
        write_text(markdown, comparison_markdown(comparisons, resamples, seed))
        print(f"wrote {markdown}")
    if json:
        write_json(json, comparison_json(comparisons, resamples, seed))
        print(f"wrote {json}")
    worse = [f"{found.model} in {', '.join(found.regressions)}" for found in comparisons if found.regressions]
    if fail_on_regression and worse:
        print(f"regression: {'; '.join(worse)}")
        raise typer.Exit(1)


def _check_outputs(markdown: Path | None, json: Path | None) -> None:
    from tinyllama_hf.errors import InputError

    for option, path in (("--markdown", markdown), ("--json", json)):
        if path:
            check_output_file(option, path)
    if markdown and markdown == json:
        raise InputError(f"--json {json} is also the --markdown file. Name two files")
