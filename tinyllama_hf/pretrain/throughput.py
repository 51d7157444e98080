"""How fast a run is, against what its device could do."""

# Dense bf16 tensor rate in FLOP/s, without sparsity, by the name that the driver reports. Source: NVIDIA's data sheets
# (A100, H100 SXM, H200 SXM); H200 has the tensor cores of H100. A device that is not listed has no MFU: a guess would
# be off by factors.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: int, device_name: str | None, num_devices: int = 1
) -> float | None:
    """Share of the devices' peak rate that the model's own arithmetic takes (MFU), or `None` for an unknown device.

    Args:
        tokens_per_second (`float`): of the whole run.
        flops_per_token (`int`): from `TinyLlamaForCausalLM.flops_per_token`, whose convention it inherits.
        device_name (`str`, *optional*): as `torch.cuda.get_device_name` gives it; `None` for a CPU.
        num_devices (`int`): devices of the run.
    """
    peak = PEAK_FLOPS.get(device_name or "")
    return None if peak is None else tokens_per_second * flops_per_token / (peak * num_devices)
