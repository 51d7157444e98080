"""`TinyLlamaForCausalLM`: `LlamaForCausalLM` with TinyLlama's initialisation, a lean training loss and accounting.

Module names, state-dict keys and logits are those of `LlamaForCausalLM`, and what it saves is a plain Llama folder.
"""

import contextlib
import inspect
import math
import os
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_tinyllama import TinyLlamaConfig
from .errors import InputError
from .grouped_attention import packed_attention
from .losses import IGNORE_INDEX, linear_cross_entropy_sum


# `from_pretrained` arguments that are the model's, not fields of its configuration.
_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation", "quantization_config", "device_map")


# Those that follow `inputs` and `generation_config`, in their order.
_GENERATE_ARGUMENTS = tuple(inspect.signature(LlamaForCausalLM.generate).parameters)[3:-1]


class _TinyLlamaInitialization:
    """TinyLlama's initialisation: N(0, sqrt(2 / (5 d))), and N(0, 1 / (sqrt(d) layers)) where a block ends.

    d is the hidden size. Source: TinyLlama's lit_gpt/model.py, `_init_weights`. Written with `transformers.initialization`,
    which leaves loaded weights alone.
    """

    config: TinyLlamaConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        hidden_size = self.config.hidden_size
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            super()._init_weights(module)
        elif self._ends_block(module):
            init.normal_(module.weight, mean=0.0, std=1 / (math.sqrt(hidden_size) * self.config.num_hidden_layers))
        else:
            init.normal_(module.weight, mean=0.0, std=math.sqrt(2 / (5 * hidden_size)))

    def _ends_block(self, module: nn.Module) -> bool:
        # By identity: for classes outside transformers, the library never visits modules without own parameters, so
        # that the attention and MLP modules, which know their output projections, are passed over.
        names = ("o_proj", "down_proj")
        return any(found is module for name, found in self.named_modules() if name.endswith(names))


class TinyLlamaModel(_TinyLlamaInitialization, LlamaModel):
    """`LlamaModel` with TinyLlama's initialisation: the library initialises an inner model by its own class."""

    config_class = TinyLlamaConfig


class _OutputEmbedding(nn.Linear):
    """The product with the output embedding; given labels, the summed loss without whole logits.

    The loss is computed inside the module, since sharded weights are only whole while their module runs.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy_sum(hidden, self.weight, labels)


class TinyLlamaForCausalLM(_TinyLlamaInitialization, LlamaForCausalLM):
    """A causal Llama for pretraining and generation.

    Logits equal `LlamaForCausalLM`'s bit for bit for the same weights. In training mode with `labels` the logits are
    never held as a whole, and `logits` is `None` in the output.
    """

    config_class = TinyLlamaConfig
    _takes_quantized_weights = False

    def __init__(self, config: TinyLlamaConfig):
        # Not LlamaForCausalLM.__init__, which would build and initialise a LlamaModel only to throw it away.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = TinyLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = _OutputEmbedding(config.hidden_size, config.vocab_size, bias=False)
        if self.generation_config.pad_token_id is None:
            self.generation_config.pad_token_id = 0  # <unk>; in the model's own config it would freeze the row
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`, with two differences.

        In training mode with `labels`, the loss is computed without the logits (`logits` is `None`): the sum over the
        labelled tokens divided by `num_items_in_batch`, or by their number where that is not given.

        `position_ids` that restart within a row keep the documents of that row apart, as in stock Llama called without
        mask and cache; here the cache is switched off by itself, and a mask or a cache, with which stock would let the
        documents see each other, is refused. In training mode positions are taken to restart without a look at them, which
        would wait for the device.

        Args:
            input_ids (`torch.LongTensor`): `[batch, seq]`.
            position_ids (`torch.LongTensor`, *optional*): `[batch, seq]`.
            labels (`torch.LongTensor`, *optional*): `[batch, seq]`, unshifted, -100 where no token is predicted; or
                `shift_labels`, shifted already.

        Raises:
            ValueError: if documents are packed and a mask or a cache is given, or flash attention is to keep apart those of
                several rows.
        """
        if position_ids is not None and position_ids.shape[-1] > 1:
            use_cache = _cache_for_positions(position_ids, attention_mask, past_key_values, use_cache, self.training)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is None or not self.training or not keeps_all:
            return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        # Nothing reads a cache here: it would keep a copy of all keys and values, and break compilation by layer.
        inputs["use_cache"] = bool(use_cache)
        if position_ids is not None and attention_mask is None and past_key_values is None and not use_cache:
            inputs["attention_mask"] = _document_mask(self.config, position_ids)
        num_items = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(**inputs, **kwargs)
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        shift_labels = shift_labels.reshape(-1).to(outputs.last_hidden_state.device)
        hidden = outputs.last_hidden_state.reshape(-1, self.config.hidden_size)  # [batch x seq, hidden]
        loss = self.lm_head(hidden, shift_labels)
        if num_items is None:
            num_items = (shift_labels != IGNORE_INDEX).sum()
        elif torch.is_tensor(num_items):
            num_items = num_items.to(loss.device)
        return CausalLMOutputWithPast(
            loss=loss / num_items,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; with `assistant_model`, `prompt_lookup_num_tokens` or `assistant_early_exit` for any batch.

        Stock assisted generation takes one prompt (5.23). Prompts are padded on the left; `num_assistant_tokens` fixes the
        number of drafted tokens, which is otherwise chosen by what pays. See
        [`~inference.speculative.speculative_generate`].
        """
        # Only here does a model reach up, since generating with a draft is a method of models.
        from .inference.speculative import draft_of_generate, speculative_generate

        kwargs |= zip(_GENERATE_ARGUMENTS, args, strict=False)
        draft = draft_of_generate(self, generation_config, kwargs)
        if draft is None:
            # On a CPU stock attention spends most of a step on a long context; elsewhere it has kernels for groups.
            packs = self.device.type == "cpu" and self.config._attn_implementation == "sdpa"
            with packed_attention(self) if packs else contextlib.nullcontext():
                return super().generate(inputs, generation_config=generation_config, **kwargs)
        input_ids = kwargs.pop("input_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs and input_ids are given; pass one of them")
        inputs = input_ids if inputs is None else inputs
        return speculative_generate(self, draft, inputs, generation_config=generation_config, **kwargs)

    def flops_per_token(self, seq_len: int | None = None, convention: str = "without_input_embedding") -> int:
        """Floating-point operations of one training step per token, forward and backward.

        6 x parameters that multiply + 12 x layers x attention width x sequence length (attention not halved). The
        published 56 % of TinyLlama follows the default: 7.31 GFLOP for 1.1b at 2048.

        Args:
            seq_len (`int`, *optional*, defaults to the context length): tokens of a sequence.
            convention (`str`, *optional*): `"without_input_embedding"` (a look-up, not a product) or
                `"all_parameters"`.

        Raises:
            ValueError: if the convention is neither.
        """
        config = self.config
        embedding = config.vocab_size * config.hidden_size
        parameters = sum(p.numel() for p in self.parameters())
        # Tied weights appear once among the parameters: as the look-up and as the product.
        multiplied = parameters - (0 if config.tie_word_embeddings else embedding)
        if convention == "all_parameters":
            multiplied += embedding
        elif convention != "without_input_embedding":
            raise ValueError(f"convention {convention!r}: use 'without_input_embedding' or 'all_parameters'")
        attention_width = config.num_attention_heads * config.head_dim
        seq_len = config.max_position_embeddings if seq_len is None else seq_len
        return 6 * multiplied + 12 * config.num_hidden_layers * attention_width * seq_len

    def kv_cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that the keys and values of one token take in the cache, all layers together."""
        config = self.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, config=None, **kwargs: Any):
        """Loads any Llama folder, plain or `model_type: tinyllama`; arguments as in transformers.

        Raises:
            InputError: if the weights are or would be quantised, which only `tinyllama_hf.load` keeps from corruption.
        """
        if config is None:
            model_arguments = {name: kwargs.pop(name) for name in _MODEL_ARGUMENTS if name in kwargs}
            # The library hands the arguments that say where the files lie back as well, next to unknown ones.
            # No Llama needs code from its folder, and the library would ask the user whether to run it.
            config, kwargs = AutoConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **{**kwargs, "trust_remote_code": False}
            )
            kwargs.update(model_arguments)
        if not isinstance(config, TinyLlamaConfig):
            config = TinyLlamaConfig.from_llama(config)
        quantizations = kwargs.get("quantization_config"), getattr(config, "quantization_config", None)
        if quantizations != (None, None) and not cls._takes_quantized_weights:
            raise InputError(
                f"{pretrained_model_name_or_path}: quantization_config is for tinyllama_hf.load(MODEL, quantization=...), "
                "which also loads folders that were saved quantised; some processors corrupt such weights otherwise"
            )
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, as_tinyllama: bool = False, **kwargs: Any
    ) -> None:
        """Writes a plain Llama folder that every Llama tool reads; arguments as in transformers.

        Args:
            as_tinyllama (`bool`, *optional*, defaults to `False`): write `model_type: tinyllama` instead, which only the
                Auto classes of a process that imported `tinyllama_hf` know.
        """
        if as_tinyllama:
            return super().save_pretrained(save_directory, *args, **kwargs)
        own, self.config = self.config, self.config.to_llama()
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = own

    save_as_llama = save_pretrained


def _cache_for_positions(position_ids, attention_mask, past_key_values, use_cache, training) -> bool | None:
    """Decides `use_cache` where positions are given, and refuses what would silently join packed documents."""
    if training and attention_mask is None and past_key_values is None and not use_cache:
        return False  # without looking at the positions, which would wait for the device
    # A position that does not follow its predecessor starts a document, unless one of the two is padding.
    restart = position_ids.diff(dim=-1) != 1
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -position_ids.shape[-1] :].bool()
        restart = restart & real[:, 1:] & real[:, :-1]
    if (attention_mask is not None and attention_mask.dim() == 4) or not restart.any():
        return use_cache
    given = [
        name
        for name, is_given in (
            ("attention_mask", attention_mask is not None),
            ("past_key_values", past_key_values is not None),
            ("use_cache", bool(use_cache)),
        )
        if is_given
    ]
    if given:
        raise ValueError(
            f"position_ids restart within a row, so that documents are packed, but {', '.join(given)} is given too: "
            "stock attention would then let the documents see each other. Call without it, or unpack the documents"
        )
    return False


def _document_mask(config: TinyLlamaConfig, position_ids: torch.Tensor) -> torch.Tensor | BlockMask | None:
    """The causal mask of packed documents in the form that the attention takes: dense, in blocks for flex, none for flash.

    transformers (5.23) makes the same one, but reads back from the device whether there are several documents.

    Args:
        position_ids (`torch.Tensor`): `[batch, seq]`.
    """
    if "flash" in config._attn_implementation:
        if (
            position_ids.shape[0] > 1
        ):  # stock looks for documents in a single row only, and else lets them see each other
            raise ValueError(
                f"attn_implementation {config._attn_implementation}: keeps the documents of one row apart, and "
                f"position_ids has {position_ids.shape[0]} rows; use flex_attention, or one row"
            )
        return None
    documents = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    return create_causal_mask(
        config=config,
        inputs_embeds=torch.empty(
            *position_ids.shape, 0, device=position_ids.device
        ),  # read for shape, type and device
        attention_mask=None,
        past_key_values=None,
        and_mask_function=packed_sequence_mask_function(documents),
    )


AutoModelForCausalLM.register(TinyLlamaConfig, TinyLlamaForCausalLM, exist_ok=True)
