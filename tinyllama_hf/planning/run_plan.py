"""The plan of a run, derived from its recipe: steps, milestones, memory, time, disk space."""

from collections.abc import Callable
from dataclasses import dataclass

from ..configuration_tinyllama import TinyLlamaConfig
from ..devices import Device, format_bytes
from ..pretrain.checkpoints import BYTES_PER_PARAMETER
from ..pretrain.config import PretrainConfig
from ..pretrain.milestones import milestone_names, milestone_steps
from ..pretrain.schedule import learning_rate
from ..pretrain.setup import architecture, check_batches, describe_recipe, shapes_only
from .memory_engine import MEMORY_RESERVE
from .training_memory import PARTS, Layout, Sharding, StepMemory, step_memory


# Published figures for models of this size are 40 to 45 % on H100 and 55 to 60 % on A100 (llm-foundry's tables).
DEFAULT_MFU = 0.4
DEVICES_PER_NODE = 8  # hybrid sharding splits weights over the devices of a node


@dataclass(frozen=True)
class Sharded:
    """Memory per device for one way of distributing the model."""

    name: str
    memory: StepMemory
    largest_micro_batch: int | None  # that divides the step; 0: none fits, `None`: unknown device


@dataclass(frozen=True)
class Plan:
    """The quantities that follow from a recipe and a number of devices."""

    config: PretrainConfig
    model_config: TinyLlamaConfig
    num_devices: int
    device: Device | None
    mfu: float
    parameters: int
    tokens: int
    milestones: dict[int, str]  # step -> name
    learning_rates: list[tuple[str, int, float]]  # landmark, step, rate
    sharded: list[Sharded]
    seconds: float | None  # of the whole run; `None`: unknown device
    checkpoint_bytes: int  # the last ones, while a new one is written
    milestone_bytes: int  # all of them


def plan_run(
    config: PretrainConfig,
    vocab_size: int,
    num_devices: int = 1,
    device: Device | None = None,
    mfu: float = DEFAULT_MFU,
) -> Plan:
    """Plans a run without its data and without allocating the model.

    Args:
        config (`PretrainConfig`): from `load_pretrain_config`.
        vocab_size (`int`): tokens in the vocabulary.
        num_devices (`int`): processes, one per device.
        device (`Device`, *optional*): needed for the time and for the largest micro-batch.
        mfu (`float`): share of the device's peak rate, by the convention without the input embedding.

    Raises:
        InputError: if the model is not valid, or the batches do not divide.
    """
    config = config.with_precision("fp32" if device is None else "bf16")
    built = architecture(config, vocab_size)
    check_batches(config, num_devices)
    model, steps = shapes_only(built), config.steps
    parameters = sum(p.numel() for p in model.parameters())
    numbers = milestone_steps(config.milestones.tokens, config.milestones.steps, steps)
    tokens = steps.tokens_after(steps.number)
    seconds = None
    if device is not None:
        flops_per_token = model.flops_per_token(config.data.sequence_length)
        seconds = training_seconds(tokens, flops_per_token, device.flops, num_devices, mfu)
    state = BYTES_PER_PARAMETER * parameters
    milestone = 4 * parameters + (state if config.milestones.keep_training_state else 0)
    return Plan(
        config=config,
        model_config=built,
        num_devices=num_devices,
        device=device,
        mfu=mfu,
        parameters=parameters,
        tokens=tokens,
        milestones=milestone_names(numbers, steps),
        learning_rates=_landmarks(config),
        sharded=_sharded(config, built, num_devices, device),
        seconds=seconds,
        checkpoint_bytes=(config.checkpoints.keep + 1) * state,
        milestone_bytes=len(numbers) * milestone,
    )


def training_seconds(tokens: int, flops_per_token: int, peak_flops: float, num_devices: int, mfu: float) -> float:
    """Returns the time of a run: its operations divided by the rate of the devices."""
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
    """Computes the memory of each way to distribute the model over the devices."""
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

        def memory(micro: int, layout: Layout = layout) -> StepMemory:
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


def _largest(sizes: list[int], planned: int, device: Device, memory: Callable[[int], StepMemory]) -> int:
    """Returns the largest micro-batch that fits, 0 if none does. Sizes are tried outward from the planned one."""
    limit = (1 - MEMORY_RESERVE) * device.memory
    largest = next((size for size in reversed(sizes) if size <= planned and memory(size).total <= limit), 0)
    if largest == planned:
        for size in sizes:
            if size > planned and memory(size).total > limit:
                break
            largest = max(size, planned)
    return largest


def plan_lines(plan: Plan) -> list[str]:
    """Describes a plan."""
    model, compilation = shapes_only(plan.model_config), plan.config.training.compile
    text = describe_recipe(plan.config, model, plan.num_devices, compilation)
    text += [f"milestone   step {step:,} -> {name}" for step, name in plan.milestones.items()]
    return text + cost_lines(plan)


def cost_lines(plan: Plan) -> list[str]:
    """Describes what a run does not print by itself: learning rate, memory, time, disk space."""
    text = [f"rate        {rate:.3g} at step {step:,}, {name}" for name, step, rate in plan.learning_rates]
    text += _memory_lines(plan)
    text += _time_lines(plan)
    text.append(
        f"disk        {format_bytes(plan.checkpoint_bytes)} of checkpoints (the last {plan.config.checkpoints.keep}, "
        f"and the one being written), {format_bytes(plan.milestone_bytes)} of milestones"
    )
    return text


def _memory_lines(plan: Plan) -> list[str]:
    text = []
    for way in plan.sharded:
        memory = way.memory
        text += [
            f"memory      {memory.total / 1e9:.2f} GB per device, {way.name}; highest in {memory.moment}:",
            ", ".join(f"{name} {memory.parts[kind] / 1e9:.2f}" for kind, name in PARTS.items() if memory.parts[kind]),
        ]
        if plan.device is not None:
            limit = (1 - MEMORY_RESERVE) * plan.device.memory / 1e9
            largest = (
                f"{way.largest_micro_batch} sequences" if way.largest_micro_batch else "none, not even 1 sequence"
            )
            text.append(
                f"largest micro-batch that divides the step and fits {limit:.1f} GB (the device, less "
                f"{MEMORY_RESERVE:.0%}): {largest}"
            )
    return [line if line.startswith("memory") else f"            {line}" for line in text + _known_errors(plan)]


def _known_errors(plan: Plan) -> list[str]:
    """Describes the accuracy of the estimate for this kind of run, as far as it was measured."""
    training = plan.config.training
    text = ["steps of one process on an H200 took 0 to 2 % more than the estimate; DDP and FSDP2 were not measured"]
    if plan.device is not None and training.compile != "off":
        if training.kernels == "liger":
            text.append(
                "with liger and compilation they took 4 % less; the estimate is that of liger without compilation"
            )
        elif training.compile == "model":
            text.append("compile: model is estimated as compile: layers")
    if training.attention not in ("sdpa", "eager"):
        text.append(f"attention: {training.attention} is estimated as sdpa")
    return text


def _time_lines(plan: Plan) -> list[str]:
    if plan.device is None or plan.seconds is None:
        return ["time        n/a: the peak rate of the device is not known; see plan --device"]
    rate = plan.tokens / plan.seconds
    hours = plan.seconds / 3600
    duration = f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.2f} hours"
    return [
        f"time        {duration}, {hours * plan.num_devices:,.1f} GPU-hours: {rate:,.0f} tokens/s, "
        f"{rate / plan.num_devices:,.0f} per device, at {plan.mfu:.0%} of the {plan.device.flops / 1e12:g} TFLOP/s of "
        f"{plan.num_devices} x {plan.device.name}",
        f"            {plan.device.source}",
    ]
