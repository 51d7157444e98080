"""Merges a PEFT adapter into the plain weights of its base model. The output appears complete or not at all."""

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from .. import provenance
from ..configuration_tinyllama import TinyLlamaConfig
from ..conversion.arguments import DTYPES
from ..conversion.verify import sample_tokens
from ..devices import find_dtype
from ..errors import InputError, one_line
from ..files import new_folder, read_json, write_json
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..released import local_folder
from ..tokenization_tinyllama import TinyLlamaTokenizer, load_tokenizer
from .adapters import adapter_folder
from .generation import stop_token_ids
from .load import load
from .options import check_merge, check_plain


# Largest root mean square of the difference of the logits, in units of their standard deviation, by dtype of the
# merged weights. Rounding gave at most 2e-6, 0.003 and 0.03 for adapters of stories260K and SmolLM2-135M.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}
_SAMPLE_TOKENS, _LAST_TOKENS = 256, 8
_PROVENANCE = "provenance.json"


class Merge(NamedTuple):
    """The result of [`merge_adapter`]: output folder, dtype of its weights, and differences of logits.

    `difference` is that between the merged model and the base with the adapter on top, `effect` that between the base
    with and without the adapter: root mean squares in units of the standard deviation of the logits. `trained_on` is
    the base that the adapter names.
    """

    output: Path
    dtype: torch.dtype
    difference: float
    effect: float
    trained_on: str | None


def merge_adapter(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> Merge:
    """Writes a plain Llama folder with the sum of a model and an adapter, with the adapter's tokenizer and template.

    The sum is computed in fp32 and rounded once. Before the folder gets its name, its logits are compared with those
    of the base with the adapter on top.

    Args:
        base (`str` or `os.PathLike`): a folder, the name of a released checkpoint, or a Hub id; not quantized. An
            adapter that was trained on a quantized model (QLoRA) is merged into the model that was quantized.
        adapter (`str` or `os.PathLike`): folder or Hub id of a PEFT adapter that changes weights: LoRA, DoRA, rsLoRA,
            and whole or resized embeddings.
        output (`str` or `os.PathLike`): the folder to write.
        dtype (`str`, *optional*, defaults to `"auto"`): `"fp32"`, `"fp16"` or `"bf16"`; `"auto"` is the base's.
        device (`str`, *optional*, defaults to `"auto"`): where it is computed; `"auto"` is a GPU if there is one.
        overwrite (`bool`, *optional*, defaults to `False`): replace the output of an earlier merge.

    Raises:
        InputError: if the arguments cannot be used, the adapter was trained on another base or cannot be merged, or
            the logits differ. Nothing is written then.
    """
    output = Path(output)
    check_merge(str(base), str(adapter), output, overwrite)
    asked = find_dtype(dtype, DTYPES)
    on_top, folder = adapter_folder(adapter), local_folder(str(base))
    check_plain(folder)
    record: dict[str, Any] = {"base": _source(base, folder), "adapter": _source(adapter, on_top)}
    _check_trained_on(on_top, record["base"])
    trained_on = _check_kind(on_top)
    wrapped: Any
    wrapped, tokenizer = load(folder, torch.float32, device, adapter=on_top, trainable=True)
    kind = asked or AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32
    tokens = _sample(tokenizer, wrapped.config)
    expected = _logits(wrapped, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's (0.21.2), about biases and tied weights; the logits are compared
        with wrapped.disable_adapter():
            effect = _difference(_logits(wrapped, tokens), expected)
        model = _merged(wrapped, on_top)
    with new_folder(output, overwrite) as temporary:
        _save(model.to(kind), tokenizer, folder, temporary)
        del model, wrapped
        difference = _difference(_logits(load(temporary, torch.float32, device)[0], tokens), expected)
        _check_logits(difference, effect, kind, on_top)
        record |= {"dtype": str(kind)[6:], "logits": {"difference": difference, "effect": effect}}
        sha256 = provenance.weight_hashes(temporary)
        write_json(temporary / _PROVENANCE, provenance.collect(merge=record, sha256=sha256))
    return Merge(output, kind, difference, effect, trained_on)


def _source(name: str | os.PathLike, folder: Path) -> dict[str, Any]:
    record = folder / _PROVENANCE
    return {
        "path": str(name),
        "sha256": provenance.weight_hashes(folder),
        **({"provenance": read_json(record)} if record.is_file() else {}),
    }


def _check_kind(adapter: Path) -> str | None:
    """Returns the base that an adapter names; refuses kinds that add tokens to the prompt instead of weights."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    config = read_json(adapter / "adapter_config.json")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.get("peft_type"), BaseTuner)  # `load` refuses an unknown kind
    if not issubclass(tuner, BaseTuner):
        found = f"{config['peft_type']} adds no weights to layers and cannot be merged"
        raise InputError(f"adapter {adapter}: {found}. Use it with --adapter")
    return config.get("base_model_name_or_path")


def _check_trained_on(adapter: Path, base: dict[str, Any]) -> None:
    """Compares the base with the hashes that a fine-tuning run recorded, in the adapter's folder or the one above."""
    for file in (adapter / _PROVENANCE, adapter.resolve().parent / _PROVENANCE):
        trained_on = read_json(file).get("base_model") if file.is_file() else None
        if not isinstance(trained_on, dict) or not trained_on.get("sha256"):
            continue
        if set(trained_on["sha256"].values()) != set(base["sha256"].values()):
            raise InputError(
                f"adapter {adapter}: was trained on {trained_on.get('path')!r}, and {base['path']} has weights with "
                f"other hashes than {file} records. Give that model. If the same weights were only written again, "
                "remove base_model from that file"
            )
        return


def _sample(tokenizer: PreTrainedTokenizerFast, config: Any) -> torch.Tensor:
    """Returns the beginning of a bundled text and the last ids, which new tokens have."""
    length = min(_SAMPLE_TOKENS, config.max_position_embeddings - _LAST_TOKENS)
    last = range(max(config.vocab_size - _LAST_TOKENS, 0), config.vocab_size)
    return torch.tensor([*sample_tokens(tokenizer, length), *last])


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens[None].to(model.device)).logits[0].float().cpu()


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square of the difference, in units of the standard deviation of the expected logits."""
    return float((logits - expected).square().mean().sqrt() / expected.std())


def _merged(wrapped: Any, folder: Path) -> Any:
    """Merges the adapter into the weights and removes PEFT's layers.

    The output matrix of a tied model gets memory of its own first: an adapter on the embeddings or on the output
    matrix would change both. If the two are still equal after merging, the model stays tied.
    """
    was_tied = wrapped.config.tie_word_embeddings
    for name, module in wrapped.named_modules():
        if was_tied and "lm_head" in name.split(".") and "weight" in dict(module.named_parameters(recurse=False)):
            module.weight = nn.Parameter(module.weight.detach().clone())
    try:
        merged: Any = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        found = f"cannot be merged ({one_line(error)})"
        raise InputError(f"adapter {folder}: {found}. Use it with --adapter") from error
    embeddings, head = (part.weight for part in (merged.get_input_embeddings(), merged.get_output_embeddings()))
    merged.config.tie_word_embeddings = was_tied and embeddings.equal(head)
    with torch.device("meta"):
        plain = TinyLlamaForCausalLM(TinyLlamaConfig.from_llama(merged.config))
    plain.load_state_dict(merged.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = merged.generation_config
    return plain


def _save(model: TinyLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, base: Path, folder: Path) -> None:
    """Writes model, tokenizer, and the base's generation configuration with the ids of this tokenizer."""
    stop = stop_token_ids(model, tokenizer)
    model.save_pretrained(folder)
    _add_sentencepiece_model(tokenizer, base)
    tokenizer.save_pretrained(folder)
    # Not through transformers, which refuses to write some settings that it reads.
    file = base / "generation_config.json"
    fields = read_json(file) if file.is_file() else {}
    fields.pop("_from_model_config", None)  # or transformers would replace them
    ids = {"eos_token_id": stop if len(stop) > 1 else stop[0], "pad_token_id": tokenizer.pad_token_id}
    fields |= {"bos_token_id": tokenizer.bos_token_id, **ids}
    write_json(folder / "generation_config.json", fields)


def _add_sentencepiece_model(tokenizer: PreTrainedTokenizerFast, base: Path) -> None:
    """Adds the base's `tokenizer.model` to a tokenizer with the same vocabulary, which libraries save as JSON only."""
    file = base / "tokenizer.model"
    if isinstance(tokenizer, TinyLlamaTokenizer) and tokenizer.sentencepiece_model is None and file.is_file():
        own, others = (json.loads(t.backend_tokenizer.to_str())["model"] for t in (tokenizer, load_tokenizer(file)))
        if own == others:
            tokenizer.sentencepiece_model = file.read_bytes()


def _check_logits(difference: float, effect: float, dtype: torch.dtype, adapter: Path) -> None:
    """Refuses a merged model that does not compute as the base with the adapter on top; also if it is not finite."""
    tolerance, name = _TOLERANCES[dtype], str(dtype)[6:]
    found = f"merged in {name}, the logits differ by {difference:.2g} of their standard deviation from those with the"
    if not difference <= tolerance:
        raise InputError(
            f"adapter {adapter}: {found} adapter on top; at most {tolerance:g} is allowed. Nothing was written. Use "
            f"--dtype {'fp32' if dtype != torch.float32 else 'auto, and report this'}"
        )
    if dtype != torch.float32 and difference > effect:
        raise InputError(
            f"adapter {adapter}: {found} adapter on top, and the adapter itself changes them by {effect:.2g} only. "
            "Nothing was written. Use --dtype fp32, or keep the adapter apart"
        )
