"""What a recipe comes to before anything is paid for: steps, milestones, memory, days, disk."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..configuration_tinyllama import TinyLlamaConfig
from ..devices import Device, format_bytes
from ..pretrain.checkpoints import BYTES_PER_PARAMETER
from ..pretrain.config import PretrainConfig
from ..pretrain.milestones import milestone_names, milestone_steps
from ..pretrain.schedule import learning_rate
from ..pretrain.setup import architecture, check_batches, shapes_only
from .training_memory import PARTS, Layout, Memory, Sharding, step_memory


# What peers publish for models of this size on H100 lies at 40 to 45 %, on A100 at 55 to 60 % (llm-foundry's tables).
DEFAULT_MFU = 0.4
# Left for the CUDA context, communication buffers, and what the allocator cannot use.
MEMORY_RESERVE = 0.1
DEVICES_PER_NODE = 8  # what hybrid sharding splits weights over


class Sharded(NamedTuple):
    """What a way of distributing the model needs on each device."""

    name: str
    memory: Memory
    largest_micro_batch: int | None  # of those that divide the step; 0: none fits, `None`: the device is not known


class Plan(NamedTuple):
    """The quantities that follow from a recipe and a number of devices."""

    config: PretrainConfig
    model_config: TinyLlamaConfig
    num_devices: int
    device: Device | None
    mfu: float
    parameters: int
    tokens: int
    accumulation: list[int]  # micro-batches of a device in a step, for each size of a step in turn
    milestones: dict[int, str]  # step -> name
    flops_per_token: dict[str, int]  # by convention
    learning_rates: list[tuple[str, int, float]]  # landmark, step, rate
    sharded: list[Sharded]
    seconds: float | None  # of the whole run; `None`: the device is not known
    checkpoint_bytes: int  # the rolling ones, while a new one is written
    milestone_bytes: int  # all of them


def plan(
    config: PretrainConfig,
    vocab_size: int,
    num_devices: int = 1,
    device: Device | None = None,
    mfu: float = DEFAULT_MFU,
) -> Plan:
    """Works out a recipe without its data and without building the model.

    Args:
        config (`PretrainConfig`): from `load_config`.
        vocab_size (`int`): pieces of the tokenizer.
        num_devices (`int`): processes, one a device.
        device (`Device`, *optional*): without one there is no time and no largest micro-batch.
        mfu (`float`): share of the device's peak, by the convention without the input embedding.

    Raises:
        InputError: if the recipe makes no model, or its batches do not divide.
    """
    built = architecture(config, vocab_size)
    check_batches(config, num_devices)
    model, steps, length = shapes_only(built), config.steps, config.data.sequence_length
    parameters = sum(p.numel() for p in model.parameters())
    numbers = milestone_steps(config.milestones.tokens, config.milestones.steps, steps)
    flops = {name: model.flops_per_token(length, name) for name in ("without_input_embedding", "all_parameters")}
    tokens = steps.tokens_after(steps.number)
    seconds = None
    if device is not None:
        seconds = training_seconds(tokens, flops["without_input_embedding"], device.flops, num_devices, mfu)
    state = BYTES_PER_PARAMETER * parameters
    milestone = 4 * parameters + (state if config.milestones.keep_training_state else 0)
    per_device = num_devices * config.training.micro_batch_size * length
    return Plan(
        config=config,
        model_config=built,
        num_devices=num_devices,
        device=device,
        mfu=mfu,
        parameters=parameters,
        tokens=tokens,
        accumulation=[size // per_device for size in steps.sizes],
        milestones=milestone_names(numbers, steps),
        flops_per_token=flops,
        learning_rates=_landmarks(config),
        sharded=_sharded(config, built, num_devices, device),
        seconds=seconds,
        checkpoint_bytes=(config.checkpoints.keep + 1) * state,
        milestone_bytes=len(numbers) * milestone,
    )


def training_seconds(tokens: int, flops_per_token: int, peak_flops: float, num_devices: int, mfu: float) -> float:
    """Time of a run: its arithmetic over what the devices do of it in a second."""
    return tokens * flops_per_token / (peak_flops * num_devices * mfu)


def _landmarks(config: PretrainConfig) -> list[tuple[str, int, float]]:
    steps, schedule, last = config.steps, config.schedule, config.steps.number
    named = [("first step", 1)]
    if schedule.warmup_tokens:
        named.append(("end of the warm-up", steps.reaching(schedule.warmup_tokens)))
    named.append(("halfway", steps.reaching(config.training.total_tokens // 2)))
    if schedule.decay_tokens:
        named.append(("begin of the decay", steps.reaching(config.training.total_tokens - schedule.decay_tokens) + 1))
    named = [(name, min(step, last)) for name, step in [*named, ("last step", last)]]
    return [(name, step, learning_rate(step, config)) for name, step in named]


def _sharded(config: PretrainConfig, built: TinyLlamaConfig, num_devices: int, device: Device | None) -> list[Sharded]:
    """The ways that so many devices have."""
    ways: list[tuple[str, Sharding, int]] = [("one process", "none", 1)]
    if num_devices > 1:
        ways = [("DDP", "ddp", 1), ("FSDP2, full shard", "fsdp", num_devices)]
    if num_devices > DEVICES_PER_NODE and num_devices % DEVICES_PER_NODE == 0:
        ways.append((f"FSDP2, hybrid over nodes of {DEVICES_PER_NODE}", "fsdp", DEVICES_PER_NODE))
    sequences = [size // config.data.sequence_length // num_devices for size in config.steps.sizes]
    dividing = [m for m in range(1, min(sequences) + 1) if all(count % m == 0 for count in sequences)]
    planned, found = config.training.micro_batch_size, []
    for name, sharding, shards in ways:
        layout = _layout(config, device)._replace(sharding=sharding, num_shards=shards)

        def memory(micro: int, layout: Layout = layout) -> Memory:
            return step_memory(built, layout._replace(micro_batch_size=micro, accumulates=max(sequences) > micro))

        largest = None if device is None else _largest(dividing, planned, device, memory)
        found.append(Sharded(name, memory(planned), largest))
    return found


def _layout(config: PretrainConfig, device: Device | None) -> Layout:
    training = config.training
    return Layout(
        micro_batch_size=training.micro_batch_size,
        sequence_length=config.data.sequence_length,
        precision=training.precision,
        activation_checkpointing=training.activation_checkpointing,
        attention=training.attention,
        compiled=training.compile != "off" and (training.compile != "auto" or device is not None),
        kernels=training.kernels,
        device_type="cpu" if device is None else "cuda",
    )


def _largest(sizes: list[int], planned: int, device: Device, memory: Callable[[int], Memory]) -> int:
    """The largest micro-batch that fits, 0 if none does. A recipe is close to it: sizes are tried outward from the planned one."""
    limit = (1 - MEMORY_RESERVE) * device.memory
    largest = next((size for size in reversed(sizes) if size <= planned and memory(size).total <= limit), 0)
    if largest == planned:
        for size in sizes:
            if size > planned and memory(size).total > limit:
                break
            largest = max(size, planned)
    return largest


def lines(plan: Plan) -> list[str]:
    """The plan as text."""
    training, length = plan.config.training, plan.config.data.sequence_length
    sizes = ", then ".join(f"{size:,}" for size in plan.config.steps.sizes)
    micro_batches = ", then ".join(map(str, plan.accumulation))
    small, large = (plan.flops_per_token[name] / 1e9 for name in ("without_input_embedding", "all_parameters"))
    text = [
        f"model       {plan.config.model.preset}: {plan.parameters:,} parameters, "
        f"{plan.model_config.vocab_size:,} tokens in the vocabulary",
        f"tokens      {plan.tokens:,} in {plan.config.steps.number:,} steps of {sizes}; "
        f"{plan.tokens / plan.parameters:.4g} per parameter",
        f"a step      {plan.num_devices} device(s) x {micro_batches} micro-batches of {training.micro_batch_size} x "
        f"{length} tokens, {training.precision}",
        f"arithmetic  {small:.4g} GFLOP a token (6 x parameters without the input embedding + attention, not halved); "
        f"{large:.4g} counting every parameter",
    ]
    text += [f"milestone   step {step:,} -> {name}" for step, name in plan.milestones.items()]
    return text + costs(plan)


def costs(plan: Plan) -> list[str]:
    """The part of the plan that a run does not print by itself: learning rate, memory, time, disk."""
    text = [f"rate        {rate:.3g} at step {step:,}, {name}" for name, step, rate in plan.learning_rates]
    text += _memory_lines(plan)
    text += _time_lines(plan)
    text.append(
        f"disk        {format_bytes(plan.checkpoint_bytes)} of checkpoints (the last {plan.config.checkpoints.keep}, and "
        f"the one being written), {format_bytes(plan.milestone_bytes)} of milestones"
    )
    return text


def _memory_lines(plan: Plan) -> list[str]:
    text = []
    for way in plan.sharded:
        text.append(
            f"memory      {way.memory.total / 1e9:.2f} GB a device, {way.name}; highest in {way.memory.moment}:"
        )
        text.append("            " + ", ".join(_parts(way.memory)))
        if plan.device is not None:
            limit = (1 - MEMORY_RESERVE) * plan.device.memory / 1e9
            fits = (
                f"{way.largest_micro_batch} sequences" if way.largest_micro_batch else "none, not even of 1 sequence"
            )
            text.append(
                f"            largest micro-batch that divides the step and fits {limit:.1f} GB (the device, less "
                f"{MEMORY_RESERVE:.0%}): {fits}"
            )
    return text + [f"            {line}" for line in _known_error(plan)]


def _known_error(plan: Plan) -> list[str]:
    """How far the estimate was off where it was measured, for the kind of run that is planned."""
    training = plan.config.training
    text = ["measured with one process on an H200: 0 to 2 % above the estimate; DDP and FSDP2 were not measured"]
    if plan.device is not None and training.compile != "off":
        if training.kernels == "liger":
            text.append(
                "with liger and compilation the measured peak was 4 % below the estimate, which is that of liger alone"
            )
        elif training.compile == "model":
            text.append("compile: model is estimated as compile: layers")
    if training.attention not in ("sdpa", "eager"):
        text.append(f"attention: {training.attention} is estimated as sdpa")
    return text


def _parts(memory: Memory) -> Sequence[str]:
    says = {"buffers": "communication", "copies": "bf16 copies of weights", "loss": "logits and loss"}
    return [f"{says.get(part, part)} {memory.parts[part] / 1e9:.2f}" for part in PARTS if memory.parts[part]]


def _time_lines(plan: Plan) -> list[str]:
    if plan.device is None or plan.seconds is None:
        return ["time        n/a: the device's peak rate is not known"]
    rate = plan.tokens / plan.seconds
    hours = plan.seconds / 3600
    duration = f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.2f} hours"
    return [
        f"time        {duration}, {hours * plan.num_devices:,.1f} GPU-hours: {rate:,.0f} tokens/s, "
        f"{rate / plan.num_devices:,.0f} a device, at {plan.mfu:.0%} of the {plan.device.flops / 1e12:g} TFLOP/s of "
        f"{plan.num_devices} x {plan.device.name}",
        f"            {plan.device.source}",
    ]
