"""Private and internal names of other libraries that this package uses: all are listed, and all exist.

They can change in any release. When one is gone, this test names it and the files that use it. Each of these libraries
has an upper bound in `setup.cfg`.
"""

import ast
import collections
import configparser
import importlib
import inspect
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.test_layers import SOURCES, module_of


# Modules that the libraries do not document, or document as their own tools.
INTERNAL = (
    "accelerate.parallelism_config",
    "accelerate.state",
    "datatrove.pipeline.tokens.tokenizer",
    "datatrove.utils.batching",
    "functorch",
    "huggingface_hub.repocard_data",
    "huggingface_hub.utils.sha",
    "lm_eval.api",
    "lm_eval.models",
    "torch.distributed.checkpoint.api",
    "torch.distributed.checkpoint.planner",
    "torch.multiprocessing.reductions",
    "transformers.generation.utils",
    "transformers.integrations",
    "transformers.loss",
    "transformers.masking_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.quantizers",
    "transformers.utils.chat_template_utils",
    "transformers.utils.generic",
)
LIBRARIES = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "datatrove", "lm_eval", "trl", "peft", "datasets"),
    *("evaluate", "huggingface_hub", "tokenizers", "safetensors", "sentencepiece", "gguf", "torchao", "multiprocess"),
    *("numpy", "matplotlib", "typer", "rich", "pydantic", "fastapi", "uvicorn", "jinja2", "functorch"),
)
# Names that begin with an underscore and are documented.
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace"}

METRICS = tuple(f"eval/metrics/{name}/{name}.py" for name in ("bits_per_byte", "commonsense_average", "stop_rate"))
# Names as one would import them, and the files that use them. Attributes that only instances have are looked for in
# the source of their class or module.
USED: dict[str, tuple[str, ...]] = {
    # transformers
    "transformers.PretrainedConfig._attn_implementation": (
        "conversion/quantized/search.py",
        "decoding/graphs.py",
        "decoding/grouped_attention.py",
        "evaluation/harness/prefix_tree.py",
        "modeling_tinyllama.py",
        "packed_documents.py",
    ),
    "transformers.PreTrainedModel._from_config": ("planning/training_memory.py", "pretrain/setup.py"),
    "transformers.PreTrainedModel._hf_peft_config_loaded": ("inference/adapters.py",),
    "transformers.PreTrainedModel._init_weights": ("modeling_tinyllama.py",),
    "transformers.PreTrainedModel._supports_attention_backend": ("decoding/ragged_cache.py",),
    "transformers.PreTrainedModel._supports_sdpa": ("decoding/ragged_cache.py",),
    "transformers.PreTrainedTokenizerFast._save_pretrained": ("tokenization_tinyllama.py",),
    "transformers.generation.logits_process.PrefixConstrainedLogitsProcessor._prefix_allowed_tokens_fn": (
        "decoding/acceptance.py",
    ),
    "transformers.generation.utils.GenerationMixin._is_user_defined": ("decoding/supported.py",),
    "transformers.generation.utils.GenerationMixin._pad_token_tensor": ("decoding/speculative.py",),
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": (
        "finetune/packed_rows.py",
        "decoding/grouped_attention.py",
        "evaluation/harness/prefix_tree.py",
        "pretrain/launch.py",
    ),
    "transformers.loss.loss_utils.ForCausalLMLoss": ("modeling_tinyllama.py",),
    "transformers.Trainer._load_from_checkpoint": ("finetune/trainer.py",),
    "transformers.Trainer._prepare_inputs": ("finetune/rehearsal.py",),
    "transformers.masking_utils.create_causal_mask": ("packed_documents.py",),
    "transformers.masking_utils.packed_sequence_mask_function": ("packed_documents.py",),
    "transformers.masking_utils.sdpa_mask": ("decoding/grouped_attention.py", "finetune/packed_rows.py"),
    "transformers.modeling_utils._is_hf_initialized": ("modeling_tinyllama.py",),
    "transformers.core_model_loading._weight_conversions": ("quantization/quantized_model.py",),
    "transformers.modeling_layers.GradientCheckpointingLayer._gradient_checkpointing_func": (
        "planning/memory_engine.py",
    ),
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING": ("registration.py",),
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING._mapping": ("registration.py",),
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING._modules": ("registration.py",),
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING": ("modeling_tinyllama.py",),
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("modeling_tinyllama.py",),
    "transformers.models.auto.modeling_auto.MODEL_MAPPING": ("modeling_tinyllama.py",),
    "transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES": ("modeling_tinyllama.py",),
    "transformers.models.auto.modeling_auto.MODEL_MAPPING._modules": ("modeling_tinyllama.py",),
    "transformers.quantizers.quantizers_utils.should_convert_module": ("planning/inference_memory.py",),
    "transformers.utils.chat_template_utils.render_jinja_template": ("chat/render.py",),
    "transformers.utils.generic.TransformersKwargs": ("modeling_tinyllama.py",),
    "transformers.utils.generic.can_return_tuple": ("modeling_tinyllama.py",),
    # torch
    "torch._C": ("conversion/writing.py", "modeling_tinyllama.py"),
    "torch._C._are_functorch_transforms_active": ("modeling_tinyllama.py",),
    "torch._assert_async": ("packed_documents.py",),
    "torch._dynamo": ("decoding/llama_step.py",),
    "torch._inductor.decomposition.select_decomp_table": ("planning/memory_engine.py",),
    "torch._subclasses.fake_tensor.FakeTensorMode": ("planning/inference_memory.py", "planning/training_memory.py"),
    "torch.utils._python_dispatch.TorchDispatchMode": ("planning/memory_engine.py",),
    "torch.utils._pytree.tree_leaves": ("planning/kv_cache.py", "planning/memory_engine.py"),
    "functorch.compile.aot_function": ("planning/memory_engine.py",),
    "functorch.compile.min_cut_rematerialization_partition": ("planning/memory_engine.py",),
    "torch._utils": ("conversion/writing.py",),
    "torch._utils._rebuild_tensor_v2": ("conversion/writing.py",),
    "torch.ops.aten._to_copy": ("planning/memory_engine.py",),
    "torch.distributed.checkpoint.api.CheckpointException": ("pretrain/checkpoints.py",),
    "torch.distributed.checkpoint.planner.ReadItem": ("pretrain/checkpoint_reader.py",),
    "torch.multiprocessing.reductions.StorageWeakRef": ("planning/kv_cache.py",),
    "torch.nn.Module._apply": ("quantization/quantized_model.py",),
    "torch.nn.Module._forward_hooks": ("decoding/graphs.py",),
    "torch.nn.Module._forward_pre_hooks": ("decoding/graphs.py",),
    "torch.nn.Module._load_from_state_dict": ("quantization/repacking.py",),
    "torch.nn.Module._modules": ("decoding/proposals.py",),
    "torch.nn.Module._parameters": ("quantization/bitsandbytes.py",),
    "torch.nn.Module._save_to_state_dict": ("inference/packed_weights.py",),
    "torch.ops.mkldnn._linear_pointwise": ("inference/packed_weights.py",),
    "torch.ops.mkldnn._reorder_linear_weight": ("inference/packed_weights.py",),
    # accelerate
    "accelerate.parallelism_config.ParallelismConfig": ("pretrain/launch.py",),
    "accelerate.state.AcceleratorState": ("pretrain/launch.py",),
    "accelerate.state.AcceleratorState._reset_state": ("pretrain/launch.py",),
    "accelerate.state.PartialState": ("pretrain/launch.py",),
    "accelerate.state.PartialState._shared_state": ("pretrain/launch.py",),
    # trl
    "trl.DPOTrainer._prepare_dataset": ("finetune/dpo.py",),
    # bitsandbytes
    "bitsandbytes.functional._convert_weight_packed_for_cpu": ("quantization/repacking.py",),
    "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse": ("quantization/repacking.py",),
    # datatrove
    "datatrove.executor.LocalPipelineExecutor._run_for_rank": ("data/pipeline.py",),
    "datatrove.pipeline.tokens.tokenizer.TokenizedFile": ("data/pipeline.py",),
    "datatrove.utils.batching.batched": ("data/pipeline.py",),
    # lm-eval
    "lm_eval.api.task": ("evaluation/tasks/task_loading.py",),
    "lm_eval.api.task.ConfigurableTask": ("eval/tasks/instruct/instruct_tasks.py",),
    "lm_eval.api.instance.Instance": ("evaluation/harness/local_harness.py", "evaluation/harness/server_harness.py"),
    "lm_eval.api.registry.register_model": ("evaluation/harness/local_harness.py",),
    "lm_eval.models.huggingface.HFLM": ("evaluation/harness/local_harness.py",),
    "lm_eval.models.utils.handle_stop_sequences": ("evaluation/harness/local_harness.py",),
    "lm_eval.models.utils.has_bos_prefix": (
        "evaluation/harness/local_harness.py",
        "evaluation/harness/server_harness.py",
    ),
    "lm_eval.models.utils.normalize_gen_kwargs": ("evaluation/harness/local_harness.py",),
    "lm_eval.models.utils.postprocess_generated_text": (
        "evaluation/harness/local_harness.py",
        "evaluation/harness/server_harness.py",
    ),
    "lm_eval.models.huggingface.HFLM._loglikelihood_tokens": ("evaluation/harness/local_harness.py",),
    "lm_eval.models.openai_completions.LocalCompletionsAPI": ("evaluation/harness/server_harness.py",),
    "lm_eval.models.openai_completions.LocalCompletionsAPI._create_payload": ("evaluation/harness/server_harness.py",),
    "lm_eval.models.openai_completions.LocalCompletionsAPI._loglikelihood_tokens": (
        "evaluation/harness/server_harness.py",
    ),
    # huggingface_hub, evaluate, multiprocess
    "huggingface_hub.repocard_data.eval_results_to_model_index": ("hub/card.py",),
    "huggingface_hub.utils.sha.git_hash": ("hub/publish.py",),
    "evaluate.Metric._compute": METRICS,
    "evaluate.Metric._info": METRICS,
    "multiprocess.pool.Pool._pool": ("data/pipeline.py",),
}


# Attributes that are named by a string, apart from `getattr` and its like.
SPELLED = {"_weight_conversions"}


def is_private(name: str) -> bool:
    return bool(re.match(r"_[^_]", name)) and name not in PUBLIC


def is_internal(module: str) -> bool:
    return any(map(is_private, module.split("."))) or any(f"{module}.".startswith(f"{name}.") for name in INTERNAL)


def own_names(tree: ast.AST) -> set[str]:
    """Names that a source defines: functions, classes, variables, and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
    return names


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
METHODS = collections.Counter(
    node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
)
EVERYWHERE = set().union(*map(own_names, TREES.values()))


def found(tree: ast.AST, ours: set[str]) -> set[str]:
    """The private and internal names in a source that are not ours."""
    names = set()
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    our_modules = {alias.asname or alias.name for node in relative for alias in node.names}
    names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in SPELLED}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in LIBRARIES:
            module = node.module or ""
            names |= {f"{module}.{a.name}" for a in node.names if is_internal(module) or is_private(a.name)}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.split(".")[0] in LIBRARIES and is_internal(a.name)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            # A method of ours that calls the one it replaces; and attributes that a base class of ours sets.
            replaces = owner == "super()" and METHODS[node.attr] == 1
            is_ours = owner == "self" or owner in our_modules
            if replaces or node.attr not in (ours | EVERYWHERE if is_ours else ours):
                names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr", "setattr", "delattr"}:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(name) and name not in ours:
                names.add(name)
    return names


def bases(tree: ast.AST, path: Path, node: ast.ClassDef) -> list[type]:
    """The base classes of a class, where they are imported by name."""
    package = module_of(path.parent / "x").rpartition(".")[0]
    found = []
    for base in node.bases:
        first, _, rest = ast.unparse(base).partition(".")
        for statement in ast.walk(tree):
            for alias in getattr(statement, "names", []) if isinstance(statement, ast.Import | ast.ImportFrom) else []:
                if (alias.asname or alias.name) != first:
                    continue
                if isinstance(statement, ast.Import):
                    owner = importlib.import_module(alias.name)
                else:
                    module = importlib.import_module("." * statement.level + (statement.module or ""), package)
                    owner = getattr(module, alias.name)
                for part in filter(None, rest.split(".")):
                    owner = getattr(owner, part)
                found.append(owner)
    return found


def overridden(tree: ast.AST, path: Path) -> set[str]:
    """The private methods and attributes of a library's class that a class in a source replaces."""
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        defined = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        assigned = [n.targets[0] for n in node.body if isinstance(n, ast.Assign)]
        defined |= {target.id for target in assigned if isinstance(target, ast.Name)}
        if private := set(filter(is_private, defined)):
            parents = [p for base in bases(tree, path, node) for p in getattr(base, "__mro__", ())]
            theirs = [vars(p) for p in parents if p.__module__.split(".")[0] in LIBRARIES]
            names |= {name for name in private if any(name in known for known in theirs)}
    return names


def in_use(path: Path) -> set[str]:
    """Last parts of the names that a source uses."""
    tree = TREES[path]
    return {name.rpartition(".")[2] for name in found(tree, own_names(tree)) | overridden(tree, path)}


def short(path: Path) -> str:
    """A path as the table has it."""
    own = path.relative_to(ROOT).as_posix()
    return own.removeprefix("tinyllama_hf/")


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_what_is_used_is_listed(path):
    listed = {name.rpartition(".")[2] for name, files in USED.items() if short(path) in files}
    assert in_use(path) == listed


@pytest.mark.parametrize("name", USED)
def test_what_is_listed_exists(name):
    """An attribute of instances alone is looked for in the source of its class, or of its module."""
    parts, owner = name.split("."), None
    pytest.importorskip(parts[0])
    for length in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[length:]:
        if not hasattr(owner, part) and part == parts[-1]:
            assert re.search(rf"\b{part}\b", inspect.getsource(owner)), f"{name} is gone; it is used in {USED[name]}"
            return
        assert hasattr(owner, part), f"{name} is gone: {owner} has no {part}; it is used in {USED[name]}"
        owner = getattr(owner, part)


def test_a_library_with_private_names_in_use_has_an_upper_bound():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [parser["options"]["install_requires"], *dict(parser["options.extras_require"]).values()]
    bounds: dict[str, list[Requirement]] = {}
    for line in filter(None, (line.strip() for text in texts for line in text.splitlines())):
        if not line.startswith("#"):
            requirement = Requirement(line)
            bounds.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    for library in {name.partition(".")[0] for name in USED} - {"multiprocess", "functorch"}:  # of datatrove, torch
        requirements = bounds[canonicalize_name(library)]
        assert any("<" in str(r.specifier).replace("<=", "") for r in requirements), f"{library}: has no upper bound"


def test_this_test_finds_what_it_looks_for(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import torch\nfrom transformers.masking_utils import create_causal_mask\nfrom torch import _assert_async\n"
        "from torch import nn\n"
        "class Layer(nn.Module):\n    def _apply(self): self._own = getattr(torch, '_shape_as_tensor')\n"
        "    def _helper(self): return self._own, self._modules, torch._foo()\n"
    )
    tree = ast.parse(planted.read_text())
    names = {"_assert_async", "_shape_as_tensor", "_modules", "_foo", "create_causal_mask"}
    assert {name.rpartition(".")[2] for name in found(tree, own_names(tree))} == names
    assert overridden(tree, ROOT / "tinyllama_hf" / "planted.py") == {"_apply"}
