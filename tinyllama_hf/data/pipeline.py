"""The datatrove pipeline behind `prepare`: one reader, one step that tokenises, splits and writes."""

import contextlib
import hashlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.batching import batched
from datatrove.utils.logging import logger
from multiprocess import forkserver
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from .. import provenance
from .sources import Source, read_documents


_BATCH_DOCUMENTS = 256


def run_pipeline(source: Source, output: Path, record: dict[str, Any], workers: int, show_progress: bool) -> None:
    """Runs the tasks that are not complete yet; each leaves its shards and a file of counts."""
    output = output.absolute()  # fsspec (2026.9) remembers what a relative path meant before a change of directory
    work = output / "work"
    executor = _QuietExecutor(
        pipeline=steps(source, output, record),
        tasks=source.num_tasks,
        workers=min(workers, source.num_tasks),
        logging_dir=logging_folder(output),
    )
    logger.remove()  # the parent's copy; each task logs into its file
    errors: list[BaseException] = []

    def run() -> None:
        try:
            executor.run()
        except BaseException as error:
            errors.append(error)

    if threading.current_thread() is threading.main_thread():
        # Worker processes inherit this: an interrupt ends the command, which ends them; they need not each report it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), "files,",
               TextColumn("{task.fields[tokens]:.1f}M tokens"), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, disable=not show_progress) as bar:
        task = bar.add_task("Preparing", total=source.num_tasks, tokens=0.0)
        while thread.is_alive():
            thread.join(0.2)
            written = sum(file.stat().st_size for file in output.glob("*/*.tokens"))
            done = len(list((work / "logs" / "completions").glob("*")))
            bar.update(task, completed=done, tokens=written / record["token_bytes"] / 1e6)
    if errors:
        raise errors[0]


def steps(source: Source, output: Path, record: dict[str, Any]) -> list[PipelineStep]:
    """The pipeline, for any of datatrove's executors; tasks as `source.num_tasks` says."""
    return [SourceReader(source, output), SplitTokenizer(output, record)]


def logging_folder(output: Path) -> str:
    """Where executors note which tasks are complete, so that one goes on with what another has begun."""
    return str(output / "work" / "logs")


class _QuietExecutor(LocalPipelineExecutor):
    """Logs to files only: datatrove's logger writes to the terminal too, and an error with pages of source."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            finally:
                logger.remove()  # while its sink is still open


class SourceReader(PipelineStep):
    """Reads the documents of a task. datatrove's own readers skip rows that they cannot parse, with a line in a log."""

    name, type = "Documents", "READER"

    def __init__(self, source: Source, output: Path):
        super().__init__()
        self.source, self.output = source, output

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        counts: Counter = Counter(read=0, kept=0)
        for document in read_documents(self.source, rank, world_size, counts):
            yield Document(text=document.text, id=document.name)
        # Before the next step's counts, which the task ends with.
        provenance.write_json(self.output / "work" / f"rows_{rank:05d}.json", counts)


class SplitTokenizer(PipelineStep):
    """Tokenises documents as text and writes each to the split that its hash decides.

    Control tokens that a document spells out stay text; the separators are added as ids.
    """

    name, type = "Split and tokenise", "TOKENIZER"

    def __init__(self, output: Path, record: dict[str, Any]):
        super().__init__()
        self.output, self.record = output, record

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tokenizer = Tokenizer.from_file(str(self.output / "tokenizer" / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()  # a stock folder may carry either, and would cut documents without a word
        tokenizer.no_padding()
        counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "validation")}
        files = {
            split: TokenizedFile(str(self.output / split), f"{rank:05d}.tokens", token_size=self.record["token_bytes"])
            for split in counts
        }
        with JsonlWriter(str(self.output / "validation"), output_filename="${rank}.jsonl") as held_out:
            for batch in batched(self._chosen(data), _BATCH_DOCUMENTS):
                texts = [document.text for _, document in batch]
                encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
                for (split, document), encoding in zip(batch, encodings, strict=True):
                    ids = [*self.record["begin"], *encoding.ids, *self.record["end"]]
                    files[split].write(ids, None)
                    counts[split]["documents"] += 1
                    counts[split]["tokens"] += len(ids)
                    counts[split]["bytes"] += len(document.text.encode())
                    if split == "validation":
                        held_out.write(document, rank=rank)
        for file in files.values():
            file.close()
        provenance.write_json(self.output / "work" / f"counts_{rank:05d}.json", {"rank": rank, **counts})
        yield from ()

    def _chosen(self, data: DocumentsPipeline) -> Iterator[tuple[str, Document]]:
        for document in data:
            split = split_of(document.text, self.record["validation_fraction"], self.record["sample_fraction"])
            if document.text and split:
                yield split, document


def split_of(text: str, validation_fraction: float, sample_fraction: float) -> str | None:
    """The split of a document, `None` if it is left out: decided by its hash alone, as a number in [0, 1)."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < validation_fraction:
        return "validation"
    return "train" if place < validation_fraction + sample_fraction * (1 - validation_fraction) else None
