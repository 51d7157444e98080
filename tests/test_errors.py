"""The checks that every part of the package shares, against the generators that they protect."""

import sys

import numpy as np
import pytest
import torch

import tinyllama_hf_cli
from tinyllama_hf.errors import InputError, check_seed, one_line, refuse_damage


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_a_seed_is_one_that_the_generators_take(seed):
    assert check_seed(seed) == seed
    assert torch.Generator().manual_seed(seed).initial_seed() % 2**64 == seed
    np.random.SeedSequence(seed)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64, 10**30])
def test_other_seeds_are_refused_by_name_and_value(seed):
    with pytest.raises(InputError, match=f"^--seed {seed}: .*{2**64 - 1}"):
        check_seed(seed)
    with pytest.raises(InputError, match=f"^seed {seed}: "):
        check_seed(seed, "seed")
    with pytest.raises(InputError) as error:
        check_seed(seed, "")
    assert not str(error.value).startswith(str(seed)) and str(2**64 - 1) in str(error.value)


def test_torch_takes_no_larger_seed():
    with pytest.raises((ValueError, RuntimeError)):
        torch.Generator().manual_seed(2**64)


@pytest.mark.parametrize("seed", [-1, 2**64])
@pytest.mark.parametrize("words", [("generate", "x"), ("generate", "--input", "x.jsonl", "--output", "y"), ("chat",)])
def test_commands_refuse_other_seeds_before_they_look_for_a_model(words, seed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tinyllama-hf", words[0], "nowhere", *words[1:], "--seed", str(seed)])
    with pytest.raises(SystemExit) as stop:
        tinyllama_hf_cli.main()
    with pytest.raises(InputError) as error:
        check_seed(seed)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {error.value}\n"


def test_an_exception_in_one_line():
    assert one_line(ValueError("a\n\n  b ")) == "ValueError: a b"
    assert one_line(OSError()) == "OSError: no message"
    assert one_line(InputError("--seed -1: must be positive")) == "--seed -1: must be positive"
    long = one_line(ValueError("x" * 1000))
    assert len(long) == 300 and long.endswith("x...")


@pytest.mark.parametrize("error", [AttributeError, StopIteration, KeyError, OSError])
def test_what_a_reader_raises_is_damage(error):
    with pytest.raises(InputError, match=r"^model\.bin: damaged or incomplete \("), refuse_damage("model.bin"):
        raise error("odd")


@pytest.mark.parametrize("error", [InputError, MemoryError, NameError, ImportError])
def test_what_only_a_faulty_program_raises_is_no_damage(error):
    with pytest.raises(error, match=r"^odd$"), refuse_damage("model.bin"):
        raise error("odd")
