"""MFU against figures worked out by hand, and never for a device that is not known."""

import pytest

from tinyllama_hf.pretrain.throughput import model_flops_utilization


def test_the_published_figure():
    """TinyLlama: 24 000 tokens a second on each of 16 A100, 7.31 GFLOP a token, 56 %."""
    mfu = model_flops_utilization(16 * 24_000, 7_310_000_000, "NVIDIA A100-SXM4-40GB", 16)
    assert mfu == pytest.approx(0.5623, abs=1e-4)


@pytest.mark.parametrize("name", [None, "", "NVIDIA A100", "AMD Instinct MI300X"])
def test_unknown_devices_have_none(name):
    assert model_flops_utilization(1000, 1_000_000, name) is None
