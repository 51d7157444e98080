"""Model FLOPs utilization, the table of devices, the times of a run, and measured rates.

The table is checked against TinyLlama's published speed and against relations that hold between the devices; times
against a clock that the tests move.
"""

import pytest
import torch

from tests.pretrain.runs import read_metrics, run
from tinyllama_hf import TinyLlamaForCausalLM
from tinyllama_hf.data.mixture import Mixture
from tinyllama_hf.devices import DEVICES, GIB, find_device, known_device
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain import loop, step, throughput
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.throughput import measure_matmul_flops, model_flops_utilization, peak_memory_bytes


# GFLOP per token of the 1.1b model at 2048: without the input embedding, and counting every parameter.
WITHOUT_EMBEDDING, ALL = 7.314e9, 7.708e9


class TestUtilization:
    def test_tinyllamas_published_figure(self):
        """24 000 tokens/s on an A100 are 56 % by one convention and 59 % by the other."""
        assert model_flops_utilization(24_000, WITHOUT_EMBEDDING, "NVIDIA A100-SXM4-40GB") == pytest.approx(
            0.56, abs=0.005
        )
        assert model_flops_utilization(24_000, ALL, "NVIDIA A100-SXM4-40GB") == pytest.approx(0.593, abs=0.001)

    def test_h200_is_not_read_as_an_a100(self):
        """The peers' bug: H200 falls back to the A100's peak and reads 3.2 times too high."""
        ratio = model_flops_utilization(1e4, ALL, "NVIDIA A100-SXM4-40GB") / model_flops_utilization(
            1e4, ALL, "NVIDIA H200"
        )
        assert ratio == pytest.approx(3.17, abs=0.01)

    def test_of_several_devices(self):
        one = model_flops_utilization(24_000, ALL, "NVIDIA H200")
        assert model_flops_utilization(16 * 24_000, ALL, "NVIDIA H200", 16) == pytest.approx(one)

    @pytest.mark.parametrize("name", [None, "", "NVIDIA H300", "NVIDIA H200 MIG 1g.18gb", "AMD Instinct MI300X"])
    def test_unknown_device(self, name):
        """A slice of a device is a different device."""
        assert model_flops_utilization(1e4, ALL, name) is None


class TestDevices:
    def test_all_that_were_asked_for(self):
        wanted = {"h200", "h100", "a100-40g", "a100-80g", "a40", "l40s", "a6000", "3090", "4090", "5090"}
        assert wanted <= DEVICES.keys()

    def test_names_are_the_drivers_and_each_has_a_source(self):
        assert len({device.name for device in DEVICES.values()}) == len(DEVICES)
        for device in DEVICES.values():
            assert device.name.startswith("NVIDIA ") and device.source.startswith("NVIDIA ")
            assert known_device(device.name) is device

    def test_rates_are_dense_with_fp32_accumulation(self):
        """Boxes of GeForce cards state two and four times this rate: with fp16 accumulation, and with sparsity."""
        assert DEVICES["3090"].flops == pytest.approx(142e12 / 2)
        assert DEVICES["4090"].flops == pytest.approx(660.6e12 / 4, rel=1e-3)
        assert DEVICES["5090"].flops == pytest.approx(838e12 / 4, rel=1e-3)
        assert DEVICES["h200"].flops == DEVICES["h100"].flops == pytest.approx(1979e12 / 2)
        assert DEVICES["a6000"].flops / DEVICES["3090"].flops == pytest.approx(
            2.18, abs=0.01
        )  # the same chip, unhalved

    @pytest.mark.parametrize(
        ("key", "boxed"),
        [("h200", 141), ("h100", 80), ("a100-40g", 40), ("a40", 48), ("l40s", 48), ("4090", 24), ("5090", 32)],
    )
    def test_memory_is_a_little_less_than_on_the_box(self, key, boxed):
        assert 0.91 * boxed * GIB < DEVICES[key].memory < boxed * GIB

    def test_short_and_full_names(self):
        assert find_device("H200") is find_device("NVIDIA H200") is DEVICES["h200"]
        with pytest.raises(InputError, match=r"--device 'a100-40': .*'a100-40g'"):
            find_device("a100-40")
        with pytest.raises(InputError, match=r"'a100': .* a100-40g, a100-80g,"):
            find_device("a100")


class Clock:
    """Replaces `time`, and advances only on request."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TestTimeOfARun:
    def test_pauses_are_no_training_and_waiting_for_data_is_counted(self, recipe, monkeypatch):
        """A step is two micro-batches of 3 ticks for the data and 5 for the model; everything else takes hundreds."""
        clock = Clock()
        for module in (loop, step):
            monkeypatch.setattr(module, "time", clock)

        def slow(ticks, real=lambda *_, **__: None):
            def call(*arguments, **options):
                clock.now += ticks
                return real(*arguments, **options)

            return call

        monkeypatch.setattr(Mixture, "tokens", slow(3, Mixture.tokens))
        monkeypatch.setattr(TinyLlamaForCausalLM, "forward", slow(5, TinyLlamaForCausalLM.forward))
        monkeypatch.setattr(loop, "validation_losses", slow(100, loop.validation_losses))
        monkeypatch.setattr(loop, "write_checkpoint", slow(200, loop.write_checkpoint))
        monkeypatch.setattr(loop, "write_milestone", slow(400, loop.write_milestone))
        hooks = Hooks(after_milestone=slow(800), after_checkpoint=slow(1600))
        rows = [row for row in read_metrics(run(recipe, "logging.every_steps=2", hooks=hooks)) if "loss" in row]
        assert len(rows) == 6 and clock.now > 2 * (400 + 800) + 4 * (200 + 1600)
        assert {row["tokens_per_second"] for row in rows} == {256 / 16}
        assert {row["data_wait_share"] for row in rows} == {3 / 8}
        assert [row["seconds_left"] for row in rows] == [32.0 * left for left in (5, 4, 3, 2, 1, 0)]


class TestMeasured:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_matmul_rate_is_that_of_the_best_product(self, monkeypatch, dtype):
        """On a fake clock: products of 2048 run at 80 GFLOP/s, others at 20, the first of a size at half of that."""
        clock, products = Clock(), []

        def mm(left, right, out):
            assert left.dtype == right.dtype == out.dtype == dtype and left.shape == right.shape == out.shape
            products.append(len(left))
            rate = (80e9 if len(left) == 2048 else 20e9) / (2 if products.count(len(left)) == 1 else 1)
            clock.now += 2 * len(left) ** 3 / rate

        monkeypatch.setattr(throughput, "time", clock)
        monkeypatch.setattr(torch, "mm", mm)
        assert measure_matmul_flops("cpu", dtype) == pytest.approx(80e9)
        assert set(products) == {1024, 2048}, (
            "the first product of 2048 takes 0.43 s, so that one of the next size would take 3.4 s"
        )

    def test_peak_memory_grows_with_what_is_held(self):
        before = peak_memory_bytes("cpu")
        if before is None:
            pytest.skip("no /proc/self/status here")
        held = torch.ones(before + 2**26, dtype=torch.uint8)  # more than the process ever had at once
        assert peak_memory_bytes("cpu") >= len(held)
        assert peak_memory_bytes("meta") is None
