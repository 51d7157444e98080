"""transformers' own model tests on `TinyLlamaForCausalLM`, with stock `LlamaForCausalLM` as the control.

`make test-upstream` fetches the tests and runs this file; see CONTRIBUTING.md.
"""

import os
import unittest
from pathlib import Path

import pytest
import yaml
from comparison import compare


if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("needs transformers' own tests: run `make test-upstream`", allow_module_level=True)

import llama_testers
from transformers import set_seed


DIFFERENCES = yaml.safe_load((Path(__file__).parent / "differences.yaml").read_text(encoding="utf-8"))
ORIGIN = yaml.safe_load((Path(os.environ["TRANSFORMERS_TESTS"]) / "origin.yaml").read_text(encoding="utf-8"))
NAMES = unittest.TestLoader().getTestCaseNames(llama_testers.StockLlama)


@pytest.mark.parametrize("name", NAMES)
def test_ours_passes_what_stock_passes(name):
    set_seed(0)
    compare(llama_testers.StockLlama(name), llama_testers.TinyLlama(name), DIFFERENCES.get(name))


def test_every_difference_names_a_test():
    unknown = DIFFERENCES.keys() - set(NAMES)
    if unknown and "generation/test_utils.py" in ORIGIN["missing"]:
        pytest.skip(f"not fetched, or unknown: {sorted(unknown)}")
    assert not unknown
