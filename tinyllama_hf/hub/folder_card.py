"""The card of a folder that this package did not train: converted, quantized, or an adapter."""

from pathlib import Path
from typing import Any

from ..conversion.reading.containers import open_safetensors
from ..quantization.bitsandbytes import quantization_of
from .card import how_to_load, metadata_of, origin, python_code, shape_of
from .markdown import table, write_card
from .model_folder import ADAPTER_WEIGHTS, ModelFolder


def folder_card(repo: str, model: ModelFolder, license: str | None = None) -> str:
    """Writes the card of a folder's only revision, from its configuration and its record, where it has one.

    Args:
        repo (`str`): `USER/NAME`.
        model (`ModelFolder`): of any kind but `"trained"`.
        license (`str`, *optional*): an identifier that the Hub knows.
    """
    parts = [f"# {repo.split('/')[1]}", *_SECTIONS[model.kind](repo, model), _conversion(model.record)]
    metadata = {**metadata_of(model, license), **_metadata(model)}
    return write_card({name: value for name, value in metadata.items() if value is not None}, parts)


def _metadata(model: ModelFolder) -> dict[str, Any]:
    """Fields that are not those of a plain Llama; `None` takes one away."""
    if model.kind == "llama":
        return {}
    if model.kind == "adapter":
        method = model.config["peft_type"].lower()
        return {"library_name": "peft", "tags": ["llama", "tinyllama_hf", method], "base_model_relation": "adapter"}
    tag = "bitsandbytes" if model.kind == "quantized" else model.kind
    return {
        "tags": ["llama", "tinyllama_hf", tag],
        **({"base_model_relation": "quantized"} if model.base else {}),
        **({"library_name": None} if model.kind == "gguf" else {}),  # the Hub would show code for transformers
    }


def _base(model: ModelFolder, before: str) -> str:
    """The base model with a link, after some words; empty where it is not known."""
    return f"{before} [{model.base}](https://huggingface.co/{model.base.partition('@')[0]})" if model.base else ""


def _llama(repo: str, model: ModelFolder) -> list[str]:
    return [
        f"A Llama of {model.num_parameters:,} parameters{_base(model, ', made from')}.\n\n{shape_of(model.config)}",
        how_to_load(repo, "main", model),
    ]


def _quantized(repo: str, model: ModelFolder) -> list[str]:
    kind = quantization_of(model.config, str(model.path))
    load = [
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", device_map="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
    ]
    return [
        f"A Llama of {model.num_parameters:,} parameters, quantized to {kind} by bitsandbytes{_base(model, ' from')}.\n\n"
        f"{shape_of(model.config)}",
        "## How to load it\n\nStock transformers with the packages `bitsandbytes` and `accelerate`.\n\n"
        + python_code(model, load),
    ]


def _awq(repo: str, model: ModelFolder) -> list[str]:
    settings = model.config["quantization_config"]
    return [
        f"A Llama of {model.num_parameters:,} parameters, quantized by AWQ{_base(model, ' from')}: {settings.get('bits')} bit "
        f"in groups of {settings.get('group_size')}.\n\n{shape_of(model.config)}",
        f"## How to load it\n\nIn vLLM:\n\n```bash\nvllm serve {repo}\n```\n\n{_plain_again(repo)}",
    ]


def _gguf(repo: str, model: ModelFolder) -> list[str]:
    file = next(file for file in model.files if file.suffix == ".gguf").name
    return [
        f"A Llama of {model.num_parameters:,} parameters{_base(model, ' made from')} as the GGUF file `{file}`.\n\n"
        f"{shape_of(model.config)}",
        f"## How to load it\n\nIn llama.cpp:\n\n```bash\nllama-cli --hf-repo {repo} --hf-file {file}\n```\n\n"
        # Of a repository whole files are fetched by their names only.
        + _plain_again(f"{repo}/{file}"),
    ]


def _plain_again(source: str) -> str:
    return (
        "As plain weights, which stock transformers loads:\n\n"
        f"```bash\ntinyllama-hf convert {source} --to llama --output plain\n```"
    )


def _adapter(repo: str, model: ModelFolder) -> list[str]:
    config = model.config
    targets = config.get("target_modules") or ()
    facts = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "layers": targets
        if isinstance(targets, str)
        else ", ".join(sorted({name.split(".")[-1] for name in targets})),
        "trained whole": ", ".join(config.get("modules_to_save") or ()),
    }
    known = {name: str(value) for name, value in facts.items() if value not in (None, "")}
    shown = f"\n\n{table(list(known), [list(known.values())])}" if known else ""
    return [
        f"An adapter ({config['peft_type']}) of {model.num_parameters:,} parameters for PEFT{_base(model, ', on top of')}.{shown}",
        f"## How to load it\n\nStock transformers with the package `peft`.\n\n{_adapter_code(repo, model)}",
    ]


def _adapter_code(repo: str, model: ModelFolder) -> str:
    base, _, revision = model.base.partition("@")
    named = f'"{base}", revision="{revision}"' if revision else f'"{base}"'
    has_tokenizer = any(file.name == "tokenizer.json" for file in model.files)
    load = [f"model = AutoModelForCausalLM.from_pretrained({named})"]
    if rows := _embedding_rows(model.path):
        load.append(f"model.resize_token_embeddings({rows})")
    load.append(f'model = PeftModel.from_pretrained(model, "{repo}")')
    tokenizer = f'"{repo}"' if has_tokenizer else named
    load.append(f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})")
    return python_code(model, load, ["from peft import PeftModel"])


def _embedding_rows(folder: Path) -> int | None:
    """Rows of an embedding that is saved whole: the base may have another number, and PEFT does not change it."""
    tensors = open_safetensors(folder / ADAPTER_WEIGHTS)
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")), None)


def _conversion(record: dict[str, Any]) -> str:
    """Where a folder comes from; empty where it has no record."""
    if not record.keys() >= {"code", "machine", "created", "python", "libraries"}:
        return ""
    settings, before, more = record.get("conversion", {}), record.get("converted_from", {}), []
    if settings:
        more.append(["converted", f"from {settings['source']} ({settings['layout']}) to {settings['to']}"])
    if "tokens" in before:
        more.append(
            ["source", f"{before.get('name', 'a milestone')}: {before['tokens']:,} tokens in {before['step']:,} steps"]
        )
    more += [[f"file {name}", f"SHA-256 `{digest}`"] for name, digest in record.get("sha256", {}).items()]
    return origin(record, more)


_SECTIONS = {"llama": _llama, "quantized": _quantized, "awq": _awq, "gguf": _gguf, "adapter": _adapter}
