"""4-bit layers: other code never sees the layout of the kernel, and all operations of the libraries are exact."""

import copy
import io
import multiprocessing
import random
import signal
import sys
import threading

import pytest
import torch


pytest.importorskip("bitsandbytes")

from bitsandbytes import functional, nn
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16

from tinyllama_hf.quantization import repacking
from tinyllama_hf.quantization.repacking import make_reversible


pytestmark = pytest.mark.skipif(
    not has_avx512bf16(), reason="without AVX512_BF16 the library repacks nothing, and its own layers are used"
)

KINDS = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]


def quantized(kind="nf4", double=True, shape=(96, 192), storage=torch.uint8, bias=False, dtype=torch.float32):
    """Returns a quantized layer of the library in evaluation mode."""
    torch.manual_seed(0)
    rows, columns = shape
    layer = nn.Linear4bit(columns, rows, bias, torch.bfloat16, double, kind, storage)
    weight = torch.randn(shape, dtype=dtype)
    layer.weight = nn.Params4bit(weight, False, None, None, double, kind, storage, layer).to("cpu")
    if bias:
        layer.bias.data = torch.randn(rows)
    return layer.requires_grad_(False).eval()


def reversible(**options):
    layer = torch.nn.Sequential(quantized(**options))
    make_reversible(layer)
    assert type(layer[0]) is repacking.Linear4bit
    return layer[0]


def inputs(layer, rows=5):
    return torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1))


def repack(layer):
    with torch.inference_mode():
        layer(inputs(layer))
    assert is_repacked(layer)


def passed(layer):
    with torch.inference_mode():
        return layer(inputs(layer))


def is_repacked(layer):
    return getattr(layer._parameters["weight"], "packed_state", None) is not None


def bits(tensor):
    return tensor.detach().clone().view(-1).view(torch.uint8)


def assert_equal_states(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_kernel_as_the_librarys(kind, bias):
    stock, ours = quantized(*kind, bias=bias), reversible(kind=kind[0], double=kind[1], bias=bias)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 5, 70):
            x = inputs(stock, rows).to(dtype)
            with torch.inference_mode():
                assert torch.equal(stock(x), ours(x)) and ours(x).dtype == dtype
    with torch.inference_mode():
        slow = dequantize_4bit(ours.weight.data, ours.weight.quant_state) @ x.float().T
    assert is_repacked(ours) is False, "reading the scales restores the library's layout"
    bias_value = ours.bias.float() if bias else 0
    assert (stock(x).float() - slow.T - bias_value).norm() < 0.02 * slow.norm()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (640, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_state_is_bit_for_bit_what_it_was(kind, storage, shape, dtype):
    options = {"shape": shape, "storage": storage, "dtype": dtype}
    expected = quantized(*kind, **options).state_dict()
    layer = reversible(kind=kind[0], double=kind[1], **options)
    x = inputs(layer)
    for _ in range(3):
        with torch.inference_mode():
            before = layer(x)
        assert_equal_states(layer.state_dict(), expected)
        with torch.inference_mode():
            assert torch.equal(layer(x), before)
        assert is_repacked(layer)


@pytest.mark.parametrize("shape", [(48, 64), (32, 96), (172, 64), (64, 172)], ids=str)
def test_other_shapes_keep_the_slow_path(shape):
    layer = torch.nn.Sequential(quantized(shape=shape))
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    make_reversible(layer)
    with torch.inference_mode():
        y = layer(inputs(layer[0]))
    product = inputs(layer[0]) @ dequantize_4bit(layer[0].weight.data, layer[0].weight.quant_state).T
    assert (y - product).norm() < 0.02 * product.norm()
    assert_equal_states(layer.state_dict(), expected)


def test_a_state_dict_survives_later_passes():
    """It shares memory with the weight, like every state dict."""
    layer = reversible()
    expected = {name: bits(tensor) for name, tensor in layer.state_dict().items()}
    repack(layer)
    state = layer.state_dict()
    repack(layer)
    assert all(torch.equal(bits(tensor), expected[name]) for name, tensor in state.items())


def test_weights_taken_before_their_scales():
    """As in transformers: `dequantize_4bit(weight.data, weight.quant_state)`, evaluated from left to right."""
    layer = reversible()
    expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for parameters in (lambda: layer.weight, lambda: next(layer.parameters())):
        repack(layer)
        assert torch.equal(dequantize_4bit(parameters().data, parameters().quant_state), expected)


def test_gradients_are_the_librarys_whenever_they_are_asked_for():
    stock, ours = quantized(), reversible()
    stock.support_avx512bf16_for_cpu = False
    gradients = {}
    for name, layer in (("stock", stock), ("ours", ours)):
        x = inputs(layer).requires_grad_()
        if name == "ours":
            repack(layer)
        y = layer(x)  # in evaluation mode
        if name == "ours":
            repack(layer)  # between forward and backward pass
        y.square().sum().backward()
        in_training = inputs(layer).requires_grad_()
        layer.train()(in_training).square().sum().backward()
        gradients[name] = x.grad, in_training.grad
    assert all(torch.equal(a, b) for a, b in zip(gradients["stock"], gradients["ours"], strict=True))


def test_a_pass_in_inference_mode_does_not_bar_training():
    layer = reversible()
    repack(layer)
    assert not layer._parameters["weight"].is_inference()
    x = inputs(layer).requires_grad_()
    layer.train()(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickled(layer)], ids=["deepcopy", "pickle"])
def test_copies(copied):
    layer = reversible()
    expected = {name: bits(tensor) for name, tensor in layer.state_dict().items()}
    with torch.inference_mode():
        before = layer(inputs(layer))
        twin = copied(layer)
        assert torch.equal(twin(inputs(layer)), before) and torch.equal(layer(inputs(layer)), before)
    assert is_repacked(twin) and is_repacked(layer)
    for found in (twin, layer):
        assert all(torch.equal(bits(tensor), expected[name]) for name, tensor in found.state_dict().items())


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("move", [lambda layer: layer.to("cpu"), lambda layer: layer.cpu()], ids=["to", "cpu"])
def test_what_moves_has_the_librarys_layout(move):
    """A move to a GPU makes the same calls for each weight."""
    layer = reversible()
    expected = {name: bits(tensor) for name, tensor in layer.state_dict().items()}
    with torch.inference_mode():
        before = layer(inputs(layer))
    move(layer)
    assert not is_repacked(layer)
    assert all(torch.equal(bits(tensor), expected[name]) for name, tensor in layer.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(layer(inputs(layer)), before)


def test_loading_a_state_dict_into_a_repacked_layer():
    """The bytes are copied into the weight. The library (0.50.2) refuses the scales only after that."""
    layer = reversible()
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = passed(layer)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(expected)
    assert torch.equal(passed(layer), before)
    layer.load_state_dict({"weight": expected["weight"]})
    assert_equal_states(layer.state_dict(), expected)


def test_a_new_weight_is_repacked():
    """PEFT's merge and transformers' loading assign a new parameter to the layer."""
    layer, other = reversible(), quantized(kind="fp4")
    repack(layer)
    layer.weight = other.weight
    with torch.inference_mode():
        x = inputs(layer)
        assert torch.equal(layer(x), quantized(kind="fp4")(x))


def test_threads_share_a_layer():
    """First passes in parallel, and saving during forward passes of other threads."""
    layer = reversible(shape=(640, 256))
    expected = {name: bits(tensor) for name, tensor in layer.state_dict().items()}
    with torch.inference_mode():
        before = quantized(shape=(640, 256))(inputs(layer))
    wrong, start = [], threading.Barrier(4)

    def compute():
        start.wait()
        for _ in range(200):
            with torch.inference_mode():
                if not torch.equal(layer(inputs(layer)), before):
                    wrong.append("a product")

    def save():
        start.wait()
        for _ in range(100):
            state = {name: bits(tensor) for name, tensor in layer.state_dict().items()}
            if any(not torch.equal(state[name], value) for name, value in expected.items()):
                wrong.append("a state")

    threads = [threading.Thread(target=target) for target in (compute, compute, compute, save)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_layer_waits_for_no_other():
    """Two models generate in parallel."""
    busy, free = reversible(), reversible()
    repack(busy)
    repack(free)
    with busy.weight.lock:
        thread = threading.Thread(target=passed, args=(free,), daemon=True)
        thread.start()
        thread.join(30)
    assert not thread.is_alive()


CALLS = {
    "pass": lambda layer: passed(layer),
    "pass with gradients": lambda layer: layer(inputs(layer).requires_grad_()),
    "scales": lambda layer: layer.weight.quant_state,
    "state": lambda layer: layer.state_dict(),
    "copy": lambda layer: copy.deepcopy(layer),
    "move": lambda layer: layer.to("cpu"),
    "load": lambda layer: layer.load_state_dict({"weight": layer.state_dict()["weight"]}),
}


def interrupted(call, line):
    """Interrupts a call before its line of this number, counted in this package and the library's repacking.

    Returns whether the call has that many lines.
    """
    files, left, outer = (repacking.__file__, functional.__file__), line, sys.gettrace()

    def trace(frame, event, _):
        nonlocal left
        left -= event == "line"
        if not left:
            raise KeyboardInterrupt
        return trace

    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename in files else None)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


@pytest.mark.parametrize("double", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("repacked", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_interrupt_at_any_line_changes_nothing(call, repacked, double):
    """By Ctrl-C, or when memory runs out."""
    stock = quantized(double=double)
    expected = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    before, line, more = passed(stock), 0, True
    while more:
        line += 1
        for state_first in (True, False):
            layer = reversible(double=double)
            if repacked:
                repack(layer)
            taken = layer.weight.data
            more = interrupted(lambda layer=layer: call(layer), line)
            interrupted(lambda layer=layer: call(layer), line)  # again, in the state that the first one left
            if state_first:
                assert_equal_states(layer.state_dict(), expected)
                assert torch.equal(bits(taken), bits(expected["weight"])), "taken before the scales"
            assert torch.equal(passed(layer), before), line
            assert_equal_states(layer.state_dict(), expected)
    assert line > 5 or not repacked, "it has been interrupted"
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_real_interrupts_at_any_time():
    """By signals; another thread would then wait for a lock that was not released.

    In a process of its own: torch restores gradient and inference mode in Python, where a signal may come in between.
    """
    process = multiprocessing.get_context("spawn").Process(target=interrupted_at_any_time)
    process.start()
    process.join()
    assert process.exitcode == 0


def interrupted_at_any_time():
    layer, found = reversible(shape=(640, 256)), []
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = passed(quantized(shape=(640, 256)))
    draw = random.Random(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(100):
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 5e-3))
            while True:
                passed(layer)
                layer.state_dict()
        except KeyboardInterrupt:
            pass
        assert torch.equal(passed(layer), before)
        assert_equal_states(layer.state_dict(), expected)
    thread = threading.Thread(target=lambda: found.append(passed(layer)), daemon=True)
    thread.start()
    thread.join(30)
    assert torch.equal(found[0], before)
