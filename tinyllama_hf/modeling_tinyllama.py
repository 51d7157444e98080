"""`TinyLlamaForCausalLM`: `LlamaForCausalLM` with TinyLlama's initialization and a memory-efficient training loss.

Module names, state-dict keys and logits are those of `LlamaForCausalLM`. By default it saves a plain Llama folder.
"""

import contextlib
import inspect
import math
import os
import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_tinyllama import TinyLlamaConfig, refuse_quantized
from .decoding.grouped_attention import packed_attention
from .decoding.speculative import generate_recorded, pop_draft, speculative_generate
from .errors import InputError
from .losses import IGNORE_INDEX, linear_cross_entropy_sum
from .packed_documents import document_mask, use_cache_for_positions


# The parameters of `generate` after `inputs` and `generation_config`, in order.
_GENERATE_ARGUMENTS = tuple(inspect.signature(LlamaForCausalLM.generate).parameters)[3:-1]


class _TinyLlamaInitialization(LlamaPreTrainedModel):
    """TinyLlama's initialization: std sqrt(2 / (5 d)), and 1 / (sqrt(d) layers) for the output projection of a block.

    d is the hidden size. Source: TinyLlama's lit_gpt/model.py, `_init_weights`. Uses `transformers.initialization`,
    which does not change loaded weights.
    """

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        hidden_size = self.config.hidden_size
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            super()._init_weights(module)
            return
        std = math.sqrt(2 / (5 * hidden_size))
        if self._ends_block(module):
            std = 1 / (math.sqrt(hidden_size) * self.config.num_hidden_layers)
        init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        # As in transformers: loaded weights have this mark, and indexing a row would lose it.
        is_loaded = getattr(module.weight, "_is_hf_initialized", False)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and not is_loaded:
            init.zeros_(module.weight[module.padding_idx])

    def _ends_block(self, module: nn.Module) -> bool:
        # By identity, since only the module is given. For classes outside transformers, the library does not visit
        # modules without their own parameters, such as the attention and MLP modules, which know their output
        # projections.
        names = ("o_proj", "down_proj")
        return any(found is module for name, found in self.named_modules() if name.endswith(names))


class TinyLlamaModel(_TinyLlamaInitialization, LlamaModel):
    """`LlamaModel` with TinyLlama's initialization; transformers initializes an inner model by its own class."""

    config_class = TinyLlamaConfig


class _OutputEmbedding(nn.Linear):
    """The output embedding, which returns logits, or with labels the summed loss without the full logits.

    The loss is computed inside the module, since FSDP gathers sharded weights only while their module runs.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy_sum(hidden, self.weight, labels)

    @property
    def computes_loss(self) -> bool:
        """Whether the loss can be computed in the module: no bias, and weights that are unsharded while it runs."""
        if self.bias is not None:
            return False
        if not isinstance(self.weight, DTensor):
            return True
        # FSDP2 gathers its own shards only. Weights that tensor parallelism has sharded are sharded twice.
        return isinstance(self, FSDPModule) and sum(placement.is_shard() for placement in self.weight.placements) <= 1


class TinyLlamaForCausalLM(_TinyLlamaInitialization, LlamaForCausalLM):
    """A causal Llama for pretraining and generation.

    Logits equal those of `LlamaForCausalLM` bit for bit for the same weights. In training mode with `labels`, the full
    logits are never in memory: `logits` is `None` in the output, and a forward hook on `lm_head` gets the summed loss.
    """

    config_class = TinyLlamaConfig
    _takes_quantized_weights = False

    def __init__(self, config: TinyLlamaConfig):
        # Not LlamaForCausalLM.__init__, which would also build and initialize a LlamaModel.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = TinyLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = _OutputEmbedding(config.hidden_size, config.vocab_size, bias=False)
        if self.generation_config.pad_token_id is None:
            self.generation_config.pad_token_id = 0  # <unk>; in `config` it would freeze the embedding row
        self.loss_type = "ForCausalLM"  # transformers derives it from known class names only, and warns otherwise
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # See the end of this file. `fully_shard` creates subclasses too.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.__name__] = cls.__name__

    @can_return_tuple
    def forward(  # type: ignore[misc]  # `TransformersKwargs` names `position_ids` too, as in transformers
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`, with two differences.

        **Loss.** In training mode with `labels`, the loss is computed without the full logits, and `logits` is `None`.
        The loss is the sum over the labeled tokens divided by `num_items_in_batch`, by default their number. It has
        first derivatives only. The stock loss over full logits is used if the output embedding was replaced, wrapped,
        given a bias or sharded by tensor parallelism; with a custom `loss_function`, an `ignore_index` other than -100
        or `logits_to_keep`; and inside the transforms of `torch.func`.

        **Packed documents.** If `position_ids` restart within a row, the documents of that row do not attend to each
        other, as in stock Llama without mask and cache. In evaluation mode the cache is then disabled. A token mask or
        a cache is an error, since stock attention would join the documents. In training mode, positions are assumed to
        restart, since reading them would wait for the device. In compiled or exported models, and on an accelerator
        for several tokens after a cache, packed documents raise an error on the device, unless `use_cache=False` is
        passed or configured and neither mask nor cache is given.

        Args:
            input_ids (`torch.LongTensor`): `[batch, seq]`.
            position_ids (`torch.LongTensor`, *optional*): `[batch, seq]`.
            labels (`torch.LongTensor`, *optional*): `[batch, seq]`, not shifted, -100 where no token is predicted.
                Shifted labels can be given as `shift_labels`.

        Raises:
            ValueError: if documents are packed and a mask or a cache is given, or with flash attention and several
                rows.
            RuntimeError: the same, raised by the device.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if position_ids is not None and position_ids.shape[-1] > 1:
            inputs["use_cache"] = use_cache_for_positions(self.config, inputs, self.training)
        if labels is None or not self._computes_lean_loss(logits_to_keep, kwargs.get("ignore_index", IGNORE_INDEX)):
            return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        # A cache is not needed here. It would copy all keys and values, and break compilation per layer.
        inputs["use_cache"] = bool(use_cache)
        if position_ids is not None and attention_mask is None and past_key_values is None and not use_cache:
            inputs["attention_mask"] = document_mask(self.config, position_ids)
        num_items = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(**inputs, **kwargs)
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        return CausalLMOutputWithPast(
            loss=self._lean_loss(outputs.last_hidden_state, shift_labels, num_items),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _computes_lean_loss(self, logits_to_keep: int | torch.Tensor, ignore_index: int) -> bool:
        """Whether the loss is the stock one, over an unwrapped `_OutputEmbedding`."""
        return (
            self.training
            and isinstance(logits_to_keep, int)
            and logits_to_keep == 0
            and ignore_index == IGNORE_INDEX
            and isinstance(self.lm_head, _OutputEmbedding)
            and self.lm_head.computes_loss
            and self.loss_function is ForCausalLMLoss
            # `torch.func.grad` differentiates the gradients again, and those of the lean loss have no derivative.
            and not torch._C._are_functorch_transforms_active()
        )

    def _lean_loss(
        self, hidden: torch.Tensor, shift_labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Returns the summed loss of `hidden` `[batch, seq, hidden]`, divided by the number of items."""
        labels = shift_labels.reshape(-1).to(hidden.device)
        loss = self.lm_head(hidden.reshape(-1, self.config.hidden_size), labels)
        if num_items is None:
            num_items = (labels != IGNORE_INDEX).sum()
        elif torch.is_tensor(num_items):
            num_items = num_items.to(loss.device)
        return loss / num_items

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, except that assisted generation supports batches.

        With `assistant_model`, `prompt_lookup_num_tokens` or `assistant_early_exit`, any number of prompts can be
        given; transformers (5.23) supports one. Prompts are padded on the left. `num_assistant_tokens` fixes the
        number of drafted tokens; by default it is chosen for throughput. See
        [`~decoding.speculative.speculative_generate`]. Unlike in transformers, a draft does not support
        `output_hidden_states`, `output_attentions`, a cache as input or output, `inputs_embeds` and
        `assistant_tokenizer`. `num_assistant_tokens_schedule` and `assistant_confidence_threshold` are errors as
        arguments, and are ignored in a generation configuration.

        On CUDA, plain decoding runs as graphs over caches of fixed size, which are recorded in the first call and kept
        with the model. Arguments that this does not support, such as beams, `return_dict_in_generate` or a cache, use
        the loop of transformers. Sampled tokens then differ for the same seed, and each follows from it as well.

        On a CPU, `gqa_packed` attention replaces sdpa during the call: `config._attn_implementation` has this value,
        and an implementation that a callback sets is undone at the end.
        """
        kwargs |= zip(_GENERATE_ARGUMENTS, args, strict=False)
        draft = pop_draft(self, generation_config, kwargs)
        if draft is None:
            options = {"input_ids": inputs, "generation_config": generation_config, **kwargs}
            output = generate_recorded(self, **options) if inputs is None or "input_ids" not in kwargs else None
            if output is not None:
                return output
            # On a CPU, stock attention takes most of a step with a long context. GPUs have kernels for grouped
            # queries.
            packs = self.device.type == "cpu" and self.config._attn_implementation == "sdpa"
            with packed_attention([self.config]) if packs else contextlib.nullcontext():
                # transformers types `self` of `generate` by a protocol that its own models do not match.
                return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]
        input_ids = kwargs.pop("input_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs and input_ids are both given. Pass one of them")
        inputs = input_ids if inputs is None else inputs
        return speculative_generate(self, draft, inputs, generation_config=generation_config, **kwargs)

    def flops_per_token(self, seq_len: int | None = None, convention: str = "without_input_embedding") -> int:
        """Returns the floating-point operations per token of a training step, forward and backward.

        6 x matrix parameters + 12 x layers x attention width x sequence length (attention not halved for the causal
        mask). TinyLlama's published 56 % uses the default convention: 7.31 GFLOP for 1.1b at 2048.

        Args:
            seq_len (`int`, *optional*, defaults to the context length): sequence length.
            convention (`str`, *optional*): `"without_input_embedding"`, since it is a lookup and not a product, or
                `"all_parameters"`.

        Raises:
            ValueError: if the convention is unknown.
        """
        config = self.config
        embedding = config.vocab_size * config.hidden_size
        parameters = sum(p.numel() for p in self.parameters())
        # Tied weights are counted once in the parameters, for the product.
        multiplied = parameters - (0 if config.tie_word_embeddings else embedding)
        if convention == "all_parameters":
            multiplied += embedding
        elif convention != "without_input_embedding":
            raise ValueError(f"convention={convention!r}: use 'without_input_embedding' or 'all_parameters'")
        assert config.head_dim is not None  # `LlamaConfig` derives it
        attention_width = config.num_attention_heads * config.head_dim
        seq_len = config.max_position_embeddings if seq_len is None else seq_len
        return 6 * multiplied + 12 * config.num_hidden_layers * attention_width * seq_len

    def kv_cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Returns the cache size of one token in bytes, all layers together."""
        config = self.config
        assert config.num_key_value_heads is not None and config.head_dim is not None  # `LlamaConfig` derives them
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads any Llama folder or repository, plain or `model_type: tinyllama`; arguments are those of transformers.

        Raises:
            InputError: if the model is not a Llama; if the weights are or would be quantized, which
                `tinyllama_hf.load` supports; or for a `gguf_file`, which `tinyllama_hf.convert` supports.
        """
        if (gguf_file := kwargs.get("gguf_file")) is not None:
            raise InputError(
                f"gguf_file={gguf_file!r}: transformers loads GGUF files into its own classes only. Convert it first: "
                f"tinyllama-hf convert {gguf_file} --to llama --output FOLDER"
            )
        plain = not cls._takes_quantized_weights
        if isinstance(config, PreTrainedConfig):
            config = config if isinstance(config, TinyLlamaConfig) else TinyLlamaConfig.from_llama(config)
            if plain:
                refuse_quantized(getattr(config, "quantization_config", None), pretrained_model_name_or_path)
        else:
            kwargs["plain"] = plain  # for `TinyLlamaConfig.get_config_dict`
        if plain:
            refuse_quantized(kwargs.get("quantization_config"), pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, as_tinyllama: bool = False, **kwargs: Any
    ) -> None:
        """Writes a plain Llama folder, which every Llama tool can read; arguments are those of transformers.

        Args:
            as_tinyllama (`bool`, *optional*, defaults to `False`): write `model_type: tinyllama` instead, which the
                Auto classes support only after `import tinyllama_hf`.
        """
        if as_tinyllama:
            return super().save_pretrained(save_directory, *args, **kwargs)
        own = self.config
        assert isinstance(own, TinyLlamaConfig)
        self.config = own.to_llama()
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = own

    save_as_llama = save_pretrained


AutoModel.register(TinyLlamaConfig, TinyLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(TinyLlamaConfig, TinyLlamaForCausalLM, exist_ok=True)
# Other parts of transformers look up classes by name: label smoothing in Trainer shifts labels only for classes in the
# second table. `register` does not fill these tables, which need the module of each class too (transformers 5.23).
for _names, _mapping, _model in (
    (MODEL_MAPPING_NAMES, MODEL_MAPPING, TinyLlamaModel),
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING, TinyLlamaForCausalLM),
):
    _names[TinyLlamaConfig.model_type] = _model.__name__
    _mapping._modules[TinyLlamaConfig.model_type] = sys.modules[__name__]
