"""A resumable job that generates for a file of prompts.

Results are appended to `OUTPUT.part` as they finish; `OUTPUT.record.json` holds the settings that they depend on. When
all prompts are finished, `OUTPUT` is written, with the rows in the order of the prompts. An interruption loses only
unfinished rows.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.proposals import Proposer
from ..errors import InputError
from ..files import locked, read_json, write_json, write_text
from ..inference.adapters import adapter_folder, load_adapted_tokenizer
from ..inference.generation import Context
from ..inference.load import context_length, model_folder
from ..inference.options import LAYERS, LOOKUP, Sampling
from ..progress import progress_bar
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
    """Checks every line of a file of prompts and the results of earlier calls, without loading weights.

    Args:
        source (`Path`): see [`read_prompts`].
        output (`Path`): JSON Lines file to write.
        model (`str`): folder, released name or Hub id. Configuration and tokenizer are downloaded first, weights only
            after the lines have been checked.
        draft (`str`, *optional*): see [`~inference.load.load_draft`].
        adapter (`str`, *optional*): folder or Hub id.
        sampling (`Sampling`, *optional*): sampling settings.
        **settings: further settings that the results depend on.

    Raises:
        InputError: as [`read_prompts`] and [`BatchJob`]; or if a model or an adapter is not valid.
    """
    if output.resolve() == source.resolve():
        raise InputError(f"--output {output}: is the file of --input. Give another file")
    sampling = sampling or Sampling()
    named = {"model": model}
    if draft is not None and draft != LOOKUP and not draft.startswith(LAYERS):
        named["draft"] = draft
    context = min((Context(_context(name), role) for role, name in named.items()), key=lambda context: context.tokens)
    prompts = read_prompts(source, load_adapted_tokenizer(adapter, model), context, sampling.max_new_tokens)
    folders = {role: model_folder(name, quantized=True) for role, name in named.items()}
    if adapter is not None:
        folders["adapter"] = adapter_folder(adapter)
    hashes = {f"{role}_sha256": _files_sha256(folder) for role, folder in folders.items()}
    options = {**dataclasses.asdict(sampling), "draft": None if "draft" in named else draft, **settings}
    named_options = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return BatchJob(output, prompts, {"input_sha256": file_sha256(source), **hashes, **named_options})


def _context(name: str) -> int:
    """Returns the context length of a model; downloads configuration and tokenizer if needed."""
    return context_length(model_folder(local_folder(name, ("config.json", *TOKENIZER_FILES)), quantized=True))


def _files_sha256(folder: Path) -> str:
    """Returns the SHA-256 of the weights and the configuration of a model or an adapter."""
    paths = {path for pattern in _DECISIVE_FILES for path in folder.glob(pattern)}
    return fingerprint({path.name: file_sha256(path) for path in paths})


class BatchJob:
    """A file of prompts and the state of its output; nothing is written before [`run`].

    Args:
        output (`Path`): JSON Lines file to write.
        prompts (`PromptFile`): from [`read_prompts`].
        settings (`dict`): settings that the results depend on, by option name; names of hashes end in `_sha256`.

    Attributes:
        pending (`list[Prompt]`): prompts without a result.
        is_finished (`bool`): whether the output is complete.

    Raises:
        InputError: if the output was not written by this command, or was started with other settings.
    """

    def __init__(self, output: Path, prompts: PromptFile, settings: dict[str, Any]):
        self.output, self.prompts = output, prompts
        self.settings = {**settings, "prompts_sha256": fingerprint([prompt.ids for prompt in prompts.prompts])}
        self.part = output.with_name(f"{output.name}.part")
        self.record = output.with_name(f"{output.name}.record.json")
        if output.is_dir():
            raise InputError(f"--output {output}: is a folder. Give a file")
        self._find_pending()

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = DEFAULT_BATCH_SIZE,
        sampling: Sampling | None = None,
        seed: int | None = None,
        draft: Proposer | None = None,
    ) -> int:
        """Generates for the pending prompts and writes the output; arguments are those of [`generate_many`].

        Returns:
            The number of generated tokens.

        Raises:
            InputError: as [`generate_many`]; or if another process writes the output, the disk is full, or the batch
                does not fit the device.
        """
        try:
            with self._locked() as part:
                self._find_pending()  # another process may have written meanwhile
                if self.is_finished:
                    self.part.unlink()
                    return 0
                requests = [Request(prompt.line, prompt.ids, prompt.max_new_tokens) for prompt in self.pending]
                completions = generate_many(model, tokenizer, requests, batch_size, sampling, seed, draft)
                write_json(self.record, {"settings": self.settings, "finished": False, "provenance": collect()})
                part.truncate(self._whole)
                num_tokens = self._write_part(part, completions, tokenizer)
                self._finish()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"--batch-size {batch_size}: does not fit the memory of {model.device}. Finished rows are kept. "
                "Run the same command with a smaller batch to resume"
            ) from error
        except OSError as error:
            raise InputError(
                f"{error.filename or self.part}: cannot be written ({error.strerror}). Finished rows are kept. Free "
                "some space and run the same command to resume"
            ) from error
        return num_tokens

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Opens the part file to append, and locks it against other processes."""
        with locked(self.part, f"--output {self.output}") as part:
            try:
                yield part
            finally:
                if not self.record.exists():  # refused before anything was generated
                    self.part.unlink(missing_ok=True)

    def _find_pending(self) -> None:
        """Reads the results of earlier calls."""
        finished = self._check_record()
        self._done, self._whole = self._read_part()
        self.is_finished = finished and self.output.is_file()
        left = () if self.is_finished else self.prompts.prompts
        self.pending = [prompt for prompt in left if prompt.line not in self._done]
        if self.output.exists() and self.pending:
            raise InputError(
                f"--output {self.output}: exists and was not written by this command. Give another file, or remove it"
            )

    def _check_record(self) -> bool:
        """Returns whether an earlier call with the same settings has finished."""
        if not self.record.is_file():
            if self.part.exists() and self.part.stat().st_size:  # an empty one was just created by `_locked`
                raise InputError(f"{self.part}: exists without {self.record.name}. Remove it to start over")
            return False
        record = read_json(self.record)
        recorded = record.get("settings") if isinstance(record, dict) else None
        if not isinstance(recorded, dict):
            raise InputError(f"{self.record}: was not written by this command. Give another --output")
        if recorded.get("--engine") == "batch":  # from versions with a second engine
            del recorded["--engine"]
        names = [name for name in self.settings | recorded if self.settings.get(name) != recorded.get(name)]
        if names:
            differences = "; ".join(_difference(name, recorded.get(name), self.settings.get(name)) for name in names)
            raise InputError(
                f"--output {self.output}: was started with other settings ({differences}). Give another file, or "
                f"remove {self.record.name} and {self.part.name} to start over"
            )
        return bool(record.get("finished"))

    def _read_part(self) -> tuple[dict[int, str], int]:
        """Returns earlier results by line number, and their size in bytes; ignores an incomplete last line."""
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
                    f"{self.part}: is damaged ({error}). Remove it and {self.record.name} to start over"
                ) from error
        return done, whole

    def _write_part(
        self, part: BinaryIO, completions: Iterable[Completion], tokenizer: PreTrainedTokenizerBase
    ) -> int:
        by_line, num_tokens = {prompt.line: prompt for prompt in self.pending}, 0
        with progress_bar("generating", "prompts", len(self.prompts.prompts)) as update:
            for completion in completions:
                result = by_line[completion.key].result(tokenizer, completion.ids, completion.finish_reason)
                self._done[completion.key] = json.dumps(result, ensure_ascii=False)
                part.write(f"{completion.key}\t{self._done[completion.key]}\n".encode())
                part.flush()
                num_tokens += len(completion.ids)
                update(completed=len(self._done), description=f"generating, {num_tokens:,} tokens")
        return num_tokens

    def _finish(self) -> None:
        rows = self._done | {bad.line: json.dumps(bad.result(), ensure_ascii=False) for bad in self.prompts.bad}
        write_text(self.output, "".join(f"{rows[line]}\n" for line in sorted(rows)))
        write_json(self.record, {**read_json(self.record), "finished": True})
        self.part.unlink()


def _difference(name: str, before: Any, now: Any) -> str:
    if name.endswith("_sha256"):
        return f"other contents of the {name.removesuffix('_sha256')}"
    return f"{name} was {before}, and is {now}"
