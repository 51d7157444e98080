"""What a file of a model folder is on the Hub: the file itself, or a text without what it tells of this machine."""

import json
from pathlib import Path
from typing import Any

import yaml

from ..portable import portable
from ..pretrain.milestones import CONFIG_FILE
from ..provenance import read_json


PROVENANCE_FILE = "provenance.json"
# Their strings are tokens and rules, which programs obey.
_VERBATIM = {"tokenizer.json", "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"}
# The same inside other files: a token may look like a path ("/think").
_TOKEN_FIELDS = ("chat_template", "stop_strings", "tokens_decoder", "_token", "_tokens")  # what their names end in


def published_content(file: Path, **fields: Any) -> Path | bytes:
    """Returns what is uploaded of a file: the file itself where nothing in it has to change, or the bytes to upload.

    Args:
        file (`Path`): of a model folder.
        **fields: replace those of the same name in a JSON object.
    """
    if file.name == CONFIG_FILE:  # always written again: comments may name anything
        settings = portable(yaml.safe_load(file.read_text(encoding="utf-8")))
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
    if file.suffix != ".json" or file.name in _VERBATIM:
        return file
    value = read_json(file)
    changed = portable(value) if file.name == PROVENANCE_FILE else _portable_fields(value)
    changed = {**changed, **fields} if fields else changed
    return file if changed == value else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _portable_fields(value: Any) -> Any:
    """A file that a library reads: paths are cut, and nothing else is touched."""
    if not isinstance(value, dict):
        return portable(value, names=False)
    others = {key: entry for key, entry in value.items() if not key.endswith(_TOKEN_FIELDS)}
    return {**value, **portable(others, names=False)}
