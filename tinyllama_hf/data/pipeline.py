"""The datatrove pipeline of `prepare`: one step that reads, tokenizes, splits and writes documents."""

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.batching import batched
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats
from multiprocess import forkserver, get_context
from tokenizers import Tokenizer

from .. import provenance
from ..errors import InputError
from ..files import write_json
from ..progress import progress_bar
from .embedded import SourceDocument
from .shards import SPLITS
from .sources import Source, read_documents
from .tasks import DataRequest, completions_folder, counts_file, logging_folder, shard_name


_BATCH_DOCUMENTS = 256


def run_pipeline(source: Source, output: Path, request: DataRequest, workers: int, show_progress: bool) -> None:
    """Runs the incomplete tasks. Each writes its shards and a file of counts.

    Raises:
        InputError: if a source is bad, or a worker was killed.
        OSError: if the output cannot be written.
    """
    output = output.absolute()  # fsspec (2026.9) caches the working directory for relative paths
    executor = _QuietExecutor(
        pipeline=[PrepareTask(source, output, request)],
        tasks=source.num_tasks,
        workers=min(workers, source.num_tasks),
        logging_dir=logging_folder(output),
    )
    logger.remove()  # of this process; each task logs to a file
    errors: list[BaseException] = []

    def run() -> None:
        try:
            executor.run()
        except BaseException as error:
            errors.append(error)

    if threading.current_thread() is threading.main_thread():
        # Inherited by the workers: an interrupt ends this process, which ends them without a traceback from each.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _show(thread, output, source.num_tasks, request.token_bytes, show_progress)
    thread.join()
    if errors:
        raise errors[0]


def _show(thread: threading.Thread, output: Path, num_tasks: int, token_bytes: int, show_progress: bool) -> None:
    """Shows the progress of a thread until it ends."""
    if not show_progress:
        return
    with progress_bar("preparing", "files", num_tasks) as update:
        pause = 0.2
        while thread.is_alive():
            thread.join(pause)
            began = time.monotonic()
            written = sum(file.stat().st_size for file in output.glob("*/*.tokens"))
            done = sum(1 for _ in completions_folder(output).glob("*"))
            update(completed=done, description=f"preparing, {written / token_bytes / 1e6:.1f}M tokens")
            # Listing a hundred thousand shards takes a while; spend at most a twentieth of the time on it.
            pause = max(0.2, 20 * (time.monotonic() - began))


class _QuietExecutor(LocalPipelineExecutor):
    """Logs to files only. datatrove also logs to the terminal, and prints long tracebacks."""

    def run(self) -> None:
        """Runs the incomplete tasks; with one worker in this process.

        The method of datatrove (0.10.1) waits forever if a worker is killed, as when memory runs out, and sends the
        whole pipeline, including the names of all files, once per task.
        """
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                self._run_for_rank(rank)
            return
        with get_context(self.start_method).Pool(self.workers, initializer=_keep, initargs=(self,)) as pool:
            processes = list(pool._pool)  # the pool replaces processes that die, and loses their tasks
            results = pool.imap_unordered(_run_task, ranks)
            waiting = len(ranks)
            while waiting:
                with contextlib.suppress(multiprocess.TimeoutError):
                    results.next(timeout=1)
                    waiting -= 1
                    continue
                if died := [process.exitcode for process in processes if process.exitcode is not None]:
                    raise InputError(
                        f"--workers {self.workers}: a worker process died (exit code {died[0]}; -9 usually means out "
                        "of memory). Use fewer workers"
                    )

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            finally:
                logger.remove()  # while its sink is still open


_executor: _QuietExecutor  # in a worker process


def _keep(executor: _QuietExecutor) -> None:
    global _executor
    _executor = executor


def _run_task(rank: int) -> None:
    _executor._run_for_rank(rank)


class PrepareTask(PipelineStep):
    """Reads the documents of a task, tokenizes them as text, and writes each to the split that its hash selects.

    The only step of the pipeline. Any datatrove executor can run it, with `source.num_tasks` tasks.

    Control tokens in a document are encoded as text; only the separators are added as ids. The readers of datatrove
    are not used, since they skip rows that they cannot parse.
    """

    name, type = "Read, tokenize and split", "TOKENIZER"

    def __init__(self, source: Source, output: Path, request: DataRequest):
        super().__init__()
        self.source, self.output, self.request = source, output, request

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        # Otherwise held-out text of an earlier attempt would remain if the file now has none.
        for file in (counts_file(self.output, rank), self.output / "validation" / f"{rank:05d}.jsonl.gz"):
            file.unlink(missing_ok=True)
        tokenizer = Tokenizer.from_file(str(self.output / "tokenizer" / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()  # a tokenizer file may enable both; truncation would silently cut documents
        tokenizer.no_padding()
        rows = Counter(read=0, kept=0, empty=0)
        counts: dict[str, dict[str, Any]] = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
        files = {
            split: TokenizedFile(str(self.output / split), f"{rank:05d}.tokens", token_size=self.request.token_bytes)
            for split in SPLITS
        }
        with JsonlWriter(str(self.output / "validation"), output_filename="${rank}.jsonl") as held_out:
            for batch in batched(self._chosen(rank, world_size, rows), _BATCH_DOCUMENTS):
                texts = [document.text for _, document in batch]
                encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
                for (split, document), encoding in zip(batch, encodings, strict=True):
                    ids = [*self.request.begin, *encoding.ids, *self.request.end]
                    files[split].write(ids, None)
                    counts[split]["documents"] += 1
                    counts[split]["tokens"] += len(ids)
                    counts[split]["bytes"] += len(document.text.encode())
                    if split == "validation":
                        held_out.write(Document(text=document.text, id=document.name), rank=rank)
        for split, file in files.items():
            file.close()
            # In the task: the file is cached, and tasks run in parallel.
            counts[split]["sha256"] = provenance.file_sha256(self.output / shard_name(split, rank))
        result = {"rank": rank, "input": self.source.identity(rank), "rows": rows, **counts}
        write_json(counts_file(self.output, rank), result)
        yield from ()

    def _chosen(self, rank: int, world_size: int, rows: Counter) -> Iterator[tuple[str, SourceDocument]]:
        """The documents of a task that are not left out, with their splits."""
        for document in read_documents(self.source, rank, world_size, rows):
            rows["empty"] += not document.text
            split = split_of(document.text, self.request.validation_fraction, self.request.sample_fraction)
            if document.text and split:
                yield split, document


def split_of(text: str, validation_fraction: float, sample_fraction: float) -> str | None:
    """The split of a document, selected by its hash as a number in [0, 1); `None` if it is left out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < validation_fraction:
        return "validation"
    return "train" if position < validation_fraction + sample_fraction * (1 - validation_fraction) else None
