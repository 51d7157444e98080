"""Memory of a training step, by part, derived from what the step holds at its heights.

The formulas count tensors: what autograd keeps of a Llama layer (`tests/planning/test_run_plan.py` holds them to the bytes that
`saved_tensors_hooks` sees), what `losses.py` allocates, 4 bytes for each fp32 weight and gradient, 8 for AdamW. Nothing is
fitted; `benchmarks/plan_memory.py` measures real steps against them. Not in it: the allocator's losses (on a CPU up to 1.6 times,
unless `MALLOC_MMAP_THRESHOLD_` is set), the libraries' own buffers, the CUDA context, a dense document mask.

Notation: N tokens of a micro-batch, d hidden size, f intermediate size, V vocabulary, C tokens of a chunk of the loss,
e bytes of what a product takes and gives (4, or 2 under bf16 autocast). Liger kernels and compilation keep less.
"""

from typing import Literal, NamedTuple

from transformers import LlamaConfig

from ..losses import ROWS, chunk_tokens


Sharding = Literal["none", "ddp", "fsdp"]
PARTS = ("weights", "gradients", "optimiser", "buffers", "copies", "activations", "loss")


class Layout(NamedTuple):
    """What a step does beside the model.

    Args:
        micro_batch_size (`int`): sequences of a forward pass.
        sequence_length (`int`): tokens of a sequence.
        precision (`str`): `"fp32"`, or `"bf16"`: autocast over fp32 weights.
        activation_checkpointing (`bool`): layers keep their input alone and are computed again.
        attention (`str`): as in the recipe; only `"eager"` keeps more.
        accumulates (`bool`): more than one micro-batch a step, so that gradients are there from the second one on.
        loss (`str`): `"chunked"`, this library's, or `"stock"`, that of `LlamaForCausalLM`.
        sharding (`str`): `"none"`; `"ddp"`: everything on every device; `"fsdp"`: FSDP2, resharded after the forward pass.
        num_shards (`int`): devices that weights are split over.
        device_type (`str`): `"cpu"` or `"cuda"`.
    """

    micro_batch_size: int
    sequence_length: int
    precision: str = "fp32"
    activation_checkpointing: bool = False
    attention: str = "sdpa"
    accumulates: bool = False
    loss: Literal["chunked", "stock"] = "chunked"
    sharding: Sharding = "none"
    num_shards: int = 1
    device_type: str = "cpu"


class Memory(NamedTuple):
    """The highest moment of a step: its name, and the bytes of each of `PARTS` then."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


class Parameters(NamedTuple):
    """Parameters of a Llama, counted from its configuration."""

    layer: int
    layer_linear: int  # of `layer`, those in products; under autocast they have a bf16 copy
    embedding: int  # rows x width, of one of the two
    total: int


def count_parameters(config: LlamaConfig) -> Parameters:
    """Counts without building the model; biases are counted where the configuration has them."""
    d, f = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linear = 2 * d * queries + 2 * d * keys + 3 * d * f
    biases = (queries + 2 * keys + d) * config.attention_bias + (2 * f + d) * config.mlp_bias
    layer, embedding = linear + biases + 2 * d, config.vocab_size * d
    total = config.num_hidden_layers * layer + d + embedding * (1 if config.tie_word_embeddings else 2)
    return Parameters(layer, linear, embedding, total)


def layer_activation_bytes(config: LlamaConfig, layout: Layout) -> int:
    """Bytes per token that autograd keeps of a decoder layer.

    Both norms: their input in fp32, the normalised input and one number; their output once for each of the five projections
    that read it where autocast casts it anew each time, else once. Attention: q, k, v, output and log-sum-exp; eager
    attention keeps keys and values repeated for each head, and the weights over the sequence, in fp32 and as cast. MLP:
    gate, up, silu(gate), and the product.
    """
    e, stream = _product_bytes(layout), _stream_bytes(layout)
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 2 * (4 * d + stream * d + 4) + e * d * (2 if e == stream else 5)
    if layout.attention == "eager":
        attention = e * 4 * queries + heads * layout.sequence_length * (4 + (e if e == 2 else 0))
    else:
        attention = e * (2 * queries + 2 * keys) + 4 * heads
    return norms + attention + 4 * e * f


def step_memory(config: LlamaConfig, layout: Layout) -> Memory:
    """The highest moment of a step, from the second one on (the optimiser's states exist after the first).

    Between the moments that are compared the memory changes by the same amount with each layer, so that the height of the
    backward pass is at its first or its last layer.
    """
    moments = [
        Memory("the loss, forward", _moment(config, layout, **_loss_forward(config, layout))),
        Memory("the loss, backward", _moment(config, layout, **_loss_backward(config, layout))),
        Memory("the backward pass of the last layer", _moment(config, layout, **_last_layer(config, layout))),
        Memory("the backward pass of the first layer", _moment(config, layout, **_first_layer(config, layout))),
        Memory("the end of the backward pass", _moment(config, layout, **_end(config, layout))),
    ]
    return max(moments, key=lambda memory: memory.total)


def _product_bytes(layout: Layout) -> int:
    return 4 if layout.precision == "fp32" else 2


def _stream_bytes(layout: Layout) -> int:
    """Of an element between the layers. FSDP2 gathers weights in bf16, so that no fp32 weight makes the stream fp32."""
    return 2 if layout.precision == "bf16" and layout.sharding == "fsdp" else 4


def _tokens(layout: Layout) -> int:
    return layout.micro_batch_size * layout.sequence_length


def _moment(
    config: LlamaConfig, layout: Layout, gradients: int, copies: int, activations: int, loss: int
) -> dict[str, int]:
    """The parts at a moment; `gradients` are those that exist then, whole, where no micro-batch came before."""
    counts = count_parameters(config)
    held = max(counts.total * 4, gradients) if layout.accumulates else gradients
    if layout.sharding != "fsdp":
        # DistributedDataParallel keeps a copy of every gradient in its buckets.
        buffers = 4 * counts.total if layout.sharding == "ddp" else 0
        return dict(
            zip(PARTS, (4 * counts.total, held, 8 * counts.total, buffers, copies, activations, loss), strict=True)
        )
    # FSDP2 gathers the layer at work and the next one, in the dtype of the products, and holds embedding and head
    # throughout the step; a gathering has its own buffer beside the weights. Gradients of the layer at work are whole
    # twice: as autograd makes them, and in the fp32 buffer of the reduction.
    e, shards = _product_bytes(layout), layout.num_shards
    outside = counts.total - config.num_hidden_layers * counts.layer
    buffers = e * (3 * counts.layer + outside) + (4 + e) * counts.layer + e * outside
    parts = (4 * counts.total // shards, held // shards, 8 * counts.total // shards, buffers, 0, activations, loss)
    return dict(zip(PARTS, parts, strict=True))


def _kept(config: LlamaConfig, layout: Layout) -> int:
    """Activations of all layers at the end of the forward pass."""
    per_token = _stream_bytes(layout) * config.hidden_size
    if not layout.activation_checkpointing:
        per_token = layer_activation_bytes(config, layout)
    return config.num_hidden_layers * per_token * _tokens(layout)


def _copies(config: LlamaConfig, layout: Layout, layers: int) -> int:
    """bf16 copies of weights: autocast keeps them until the end of the forward pass, autograd until they are used."""
    casts = _product_bytes(layout) != 4 and layout.sharding != "fsdp"
    return 2 * layers * count_parameters(config).layer_linear if casts else 0


def _tail(config: LlamaConfig, layout: Layout) -> int:
    """After the layers: what the last norm keeps, and its output."""
    return _tokens(layout) * ((4 + 2 * _stream_bytes(layout)) * config.hidden_size + 4)


def _loss_forward(config: LlamaConfig, layout: Layout) -> dict[str, int]:
    """All activations are there, and the loss works."""
    tokens, d, vocab = _tokens(layout), config.hidden_size, config.vocab_size
    e, weight = _product_bytes(layout), config.vocab_size * config.hidden_size
    cast = 2 * weight if e != _stream_bytes(layout) else 0
    if layout.loss == "stock":
        # Logits, the same in fp32, and their log-softmax.
        loss = cast + tokens * vocab * (4 + 4 + (2 if layout.precision == "bf16" else 0))
        if layout.precision == "bf16":
            loss += 2 * tokens * d
    else:
        # Besides both gradients, the logits of a chunk, and either the rows of them that are at work in fp32, or the
        # chunk's share of the weight's gradient, which a CPU adds to an fp32 tensor by way of an fp32 copy.
        chunk = min(chunk_tokens(vocab, e), tokens)
        rows = 4 * min(ROWS[layout.device_type], chunk) * vocab
        share = (e + (4 if e == 2 and layout.device_type == "cpu" else 0)) * weight
        loss = cast + 4 * weight + _stream_bytes(layout) * tokens * d + e * chunk * vocab + max(rows, share)
    activations = _kept(config, layout) + _tail(config, layout)
    return {"gradients": 0, "copies": _copies(config, layout, config.num_hidden_layers), "activations": activations,
            "loss": loss}  # fmt: skip


def _loss_backward(config: LlamaConfig, layout: Layout) -> dict[str, int]:
    """Ours multiplies both finished gradients by the incoming one; stock holds three tensors of the logits' shape."""
    tokens, weight = _tokens(layout), config.vocab_size * config.hidden_size
    if layout.loss == "stock":
        loss = 3 * 4 * tokens * config.vocab_size
        if layout.precision == "bf16":
            loss += 2 * weight + 2 * tokens * config.hidden_size
    else:
        loss = 2 * 4 * weight + 2 * _stream_bytes(layout) * tokens * config.hidden_size
    layers = 1 if layout.activation_checkpointing else config.num_hidden_layers
    copies = 0 if layout.activation_checkpointing else _copies(config, layout, layers)
    return {
        "gradients": 0,
        "copies": copies,
        "activations": _kept(config, layout) + _tail(config, layout),
        "loss": loss,
    }


def _layer_work(config: LlamaConfig, layout: Layout) -> int:
    """What the backward pass of a layer needs beside what was kept of it.

    Highest where it splits the MLP's product: the gradients of product, silu(gate) and up are there, the product itself is
    not needed any more. The gradient of the residual stream waits.
    """
    e = _product_bytes(layout)
    work = _tokens(layout) * (2 * e * config.intermediate_size + _stream_bytes(layout) * config.hidden_size)
    if layout.activation_checkpointing:
        work += layer_activation_bytes(config, layout) * _tokens(layout)
    return work


def _last_layer(config: LlamaConfig, layout: Layout) -> dict[str, int]:
    """The first to be done: nothing of the other layers is freed, and the output embedding has its gradient."""
    counts = count_parameters(config)
    layers = 1 if layout.activation_checkpointing else config.num_hidden_layers
    gradients = 4 * (counts.embedding + config.hidden_size * config.intermediate_size)
    return {"gradients": gradients, "copies": _copies(config, layout, layers),
            "activations": _kept(config, layout) + _layer_work(config, layout), "loss": 0}  # fmt: skip


def _first_layer(config: LlamaConfig, layout: Layout) -> dict[str, int]:
    """The last to be done: all others have their gradients."""
    counts = count_parameters(config)
    kept = _kept(config, layout) // config.num_hidden_layers + _layer_work(config, layout)
    before = counts.total - counts.layer - (0 if config.tie_word_embeddings else counts.embedding)
    return {"gradients": 4 * before, "copies": _copies(config, layout, 1), "activations": kept, "loss": 0}


def _end(config: LlamaConfig, layout: Layout) -> dict[str, int]:
    """The input embedding's gradient is made of what is left, the stream's; tied, it is added to the output's."""
    counts = count_parameters(config)
    gradients = 4 * (counts.total + (counts.embedding if config.tie_word_embeddings else 0))
    stream = _tokens(layout) * _stream_bytes(layout) * config.hidden_size
    return {"gradients": gradients, "copies": 0, "activations": stream, "loss": 0}
