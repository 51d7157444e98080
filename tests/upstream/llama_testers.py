"""The upstream tests as two test cases, for the stock Llama classes and for ours. Imports the upstream `tests`."""

import unittest

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from tests import test_fsdp_mixin, test_tensor_parallel_mixin
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.modeling_tinyllama import TinyLlamaModel


# Upstream runs multi-process tests only for a list of model types, which does not contain ours.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class _TwoClassesTester(CausalLMModelTester):
    """The base model and the causal model: the classes that exist both in stock and here."""

    def __init__(self, parent: unittest.TestCase):
        super().__init__(parent)
        self.question_answering_class = self.sequence_classification_class = self.token_classification_class = None


class StockLlamaTester(_TwoClassesTester):
    config_class, base_model_class, causal_lm_class = LlamaConfig, LlamaModel, LlamaForCausalLM


class TinyLlamaTester(_TwoClassesTester):
    config_class, base_model_class, causal_lm_class = TinyLlamaConfig, TinyLlamaModel, TinyLlamaForCausalLM


class StockLlama(CausalLMModelTest, unittest.TestCase):
    """As upstream's `LlamaModelTest`."""

    model_tester_class = StockLlamaTester
    model_split_percents = [0.5, 0.7, 0.8]
    _torch_compile_train_cls = LlamaForCausalLM


class TinyLlama(CausalLMModelTest, unittest.TestCase):
    model_tester_class = TinyLlamaTester
    model_split_percents = StockLlama.model_split_percents
    _torch_compile_train_cls = TinyLlamaForCausalLM
