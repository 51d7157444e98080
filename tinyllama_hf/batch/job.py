"""A file of prompts made into a file of results, which an interruption costs no more than what was under way.

Results are appended to `OUTPUT.part` as they come; `OUTPUT.record.json` says what they were made with. When all are there,
`OUTPUT` appears with the rows in the order of the prompts.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.proposals import Proposer
from ..errors import InputError
from ..files import locked, read_json, write_json, write_text
from ..inference.adapters import adapter_folder, tokenizer_with
from ..inference.drafts import LAYERS, LOOKUP
from ..inference.generation import Context, Sampling
from ..inference.load import model_folder
from ..provenance import collect, file_sha256, fingerprint
from ..released import TOKENIZER_FILES, local_folder
from .generate_many import DEFAULT_BATCH_SIZE, Completion, Request, generate_many
from .prompts import PromptFile, read_prompts


_DECISIVE_FILES = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.bin")


def open_job(
    source: Path,
    output: Path,
    model: str,
    draft: str | None = None,
    adapter: str | None = None,
    sampling: Sampling | None = None,
    **settings: Any,
) -> "BatchJob":
    """Checks every line of a file of prompts, and what an earlier call has done; no weights are loaded.

    Args:
        source (`Path`): see [`read_prompts`].
        output (`Path`): JSON lines to write.
        model (`str`): folder, released name or Hub id; of the last two small files are fetched before the lines are checked.
        draft (`str`, *optional*): as of `load_draft`.
        adapter (`str`, *optional*): folder or Hub id.
        sampling (`Sampling`, *optional*): as it will be.
        **settings: what else decides the results.

    Raises:
        InputError: as [`read_prompts`] and [`BatchJob`]; or if a model or an adapter is none.
    """
    if output.resolve() == source.resolve():
        raise InputError(f"--output {output}: is the file of --input; name another")
    sampling = sampling or Sampling()
    own_draft = draft is None or draft == LOOKUP or draft.startswith(LAYERS)
    named = {"model": model} if own_draft else {"model": model, "draft": draft}
    context = min((Context(_context(name), role) for role, name in named.items()), key=lambda context: context.tokens)
    prompts = read_prompts(source, tokenizer_with(adapter, model), context, sampling.max_new_tokens)
    folders = {role: model_folder(name, quantized=True) for role, name in named.items()}
    if adapter is not None:
        folders["adapter"] = adapter_folder(adapter)
    hashes = {f"{role}_sha256": _files_sha256(folder) for role, folder in folders.items()}
    options = {**dataclasses.asdict(sampling), "draft": draft if own_draft else None, **settings}
    named_options = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return BatchJob(output, prompts, {"input_sha256": file_sha256(source), **hashes, **named_options})


def _context(name: str) -> int:
    """Tokens that a model can read; of one that is not here the small files are fetched."""
    folder = model_folder(local_folder(name, ("config.json", *TOKENIZER_FILES)), quantized=True)
    context = read_json(folder / "config.json").get("max_position_embeddings", LlamaConfig.max_position_embeddings)
    if not isinstance(context, int):
        raise InputError(f"{folder / 'config.json'}: max_position_embeddings {context!r} is no number; fetch it again")
    return context


def _files_sha256(folder: Path) -> str:
    """SHA-256 over the weights and the configuration of a model or an adapter."""
    paths = {path for pattern in _DECISIVE_FILES for path in folder.glob(pattern)}
    return fingerprint({path.name: file_sha256(path) for path in paths})


class BatchJob:
    """The way from prompts to results; nothing is written before [`run`].

    Args:
        output (`Path`): JSON lines to write.
        prompts (`PromptFile`): from [`read_prompts`].
        settings (`dict`): what decides the results, by the names of options or of what it is; hashes end in `_sha256`.

    Attributes:
        pending (`list[Prompt]`): what is still to be generated.
        is_finished (`bool`): whether the output is there, so that nothing is to be done.

    Raises:
        InputError: if the output is something else, or was begun with other settings.
    """

    def __init__(self, output: Path, prompts: PromptFile, settings: dict[str, Any]):
        self.output, self.prompts = output, prompts
        self.settings = {**settings, "prompts_sha256": fingerprint([prompt.ids for prompt in prompts.prompts])}
        self.part = output.with_name(f"{output.name}.part")
        self.record = output.with_name(f"{output.name}.record.json")
        if output.is_dir():
            raise InputError(f"--output {output}: is a folder; name a file")
        self._find_pending()

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = DEFAULT_BATCH_SIZE,
        sampling: Sampling | None = None,
        seed: int | None = None,
        draft: Proposer | None = None,
        show_progress: bool = True,
    ) -> int:
        """Generates what is pending and writes the output; arguments as of [`generate_many`].

        Returns:
            The number of tokens that were generated.

        Raises:
            InputError: as [`generate_many`]; or if another process writes the output, the disk is full, or the batch is too
                large for the device.
        """
        try:
            with self._locked() as part:
                self._find_pending()  # another process may have gone on since
                if self.is_finished:
                    self.part.unlink()
                    return 0
                requests = [Request(prompt.line, prompt.ids, prompt.max_new_tokens) for prompt in self.pending]
                completions = generate_many(model, tokenizer, requests, batch_size, sampling, seed, draft)
                write_json(self.record, {"settings": self.settings, "finished": False, "provenance": collect()})
                part.truncate(self._whole)
                num_tokens = self._write_part(part, completions, tokenizer, show_progress)
                self._finish()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"--batch-size {batch_size}: does not fit the memory of {model.device}; what was done is kept, and the same "
                "command goes on with a smaller one"
            ) from error
        except OSError as error:
            raise InputError(
                f"{error.filename or self.part}: cannot be written ({error.strerror}); what was written is kept: make room, "
                "and the same command goes on"
            ) from error
        return num_tokens

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The part, opened to append, which no other process has meanwhile."""
        with locked(self.part, f"--output {self.output}") as part:
            try:
                yield part
            finally:
                if not self.record.exists():  # refused before anything was done
                    self.part.unlink(missing_ok=True)

    def _find_pending(self) -> None:
        """Reads what earlier calls have done."""
        finished = self._check_record()
        self._done, self._whole = self._read_part()
        self.is_finished = finished and self.output.is_file()
        left = () if self.is_finished else self.prompts.prompts
        self.pending = [prompt for prompt in left if prompt.line not in self._done]
        if self.output.exists() and self.pending:
            raise InputError(
                f"--output {self.output}: exists, and was not written by this command; name another file, or remove it"
            )

    def _check_record(self) -> bool:
        """Whether an earlier call with the same settings has finished."""
        if not self.record.is_file():
            if self.part.exists() and self.part.stat().st_size:  # an empty one is our own, just locked
                raise InputError(f"{self.part}: lies there without {self.record.name}; remove it to begin anew")
            return False
        record = read_json(self.record)
        there = record.get("settings") if isinstance(record, dict) else None
        if not isinstance(there, dict):
            raise InputError(f"{self.record}: is no record of this command; name another --output")
        if there.get("--engine") == "batch":  # written while there was a second engine
            del there["--engine"]
        names = [name for name in self.settings | there if self.settings.get(name) != there.get(name)]
        if names:
            differences = "; ".join(_difference(name, there.get(name), self.settings.get(name)) for name in names)
            raise InputError(
                f"--output {self.output}: was begun with other settings ({differences}), and results of two settings are not "
                f"joined; name another file, or remove {self.record.name} and what lies beside it to begin anew"
            )
        return bool(record.get("finished"))

    def _read_part(self) -> tuple[dict[int, str], int]:
        """What an earlier call has done, by line, and the bytes of it; a last line that was cut off is not among them."""
        if not self.part.is_file():
            return {}, 0
        content = self.part.read_bytes()
        whole = content.rfind(b"\n") + 1
        done = {}
        for row in content[:whole].decode("utf-8", errors="replace").split("\n")[:-1]:
            line, _, result = row.partition("\t")
            try:
                json.loads(result)
                done[int(line)] = result
            except ValueError as error:
                raise InputError(
                    f"{self.part}: damaged ({error}); remove it and {self.record.name} to begin anew"
                ) from error
        return done, whole

    def _write_part(
        self,
        part: BinaryIO,
        completions: Iterable[Completion],
        tokenizer: PreTrainedTokenizerBase,
        show_progress: bool,
    ) -> int:
        by_line, num_tokens = {prompt.line: prompt for prompt in self.pending}, 0
        console = Console(stderr=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeRemainingColumn(),
        )
        shown = show_progress and console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("", total=len(self.prompts.prompts), completed=len(self._done), tokens=0)
            for completion in completions:
                result = by_line[completion.key].result(tokenizer, completion.ids, completion.finish_reason)
                self._done[completion.key] = json.dumps(result, ensure_ascii=False)
                part.write(f"{completion.key}\t{self._done[completion.key]}\n".encode())
                part.flush()
                num_tokens += len(completion.ids)
                bar.update(task, advance=1, tokens=num_tokens)
        return num_tokens

    def _finish(self) -> None:
        rows = self._done | {bad.line: json.dumps(bad.result(), ensure_ascii=False) for bad in self.prompts.bad}
        write_text(self.output, "".join(f"{rows[line]}\n" for line in sorted(rows)))
        write_json(self.record, {**read_json(self.record), "finished": True})
        self.part.unlink()


def _difference(name: str, there: Any, here: Any) -> str:
    if name.endswith("_sha256"):
        return f"{name.removesuffix('_sha256')} of other contents"
    return f"{name} {there} there, {here} here"
