"""The testers of the source archive in one class, with the attributes that they read from a causal model's tester."""

import inspect

from transformers.testing_utils import _TEXT_MODEL_TESTER_DEFAULTS

from .test_configuration_common import ConfigTester
from .test_fsdp_mixin import FSDPTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_pipeline_mixin import PipelineTesterMixin
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin


class CausalLMModelTester:
    config_class = base_model_class = causal_lm_class = None

    def __init__(self, parent):
        self.parent = parent
        vars(self).update(_TEXT_MODEL_TESTER_DEFAULTS)

    @property
    def all_model_classes(self):
        return [self.base_model_class, self.causal_lm_class]

    @property
    def pipeline_model_mapping(self):
        return {"feature-extraction": self.base_model_class, "text-generation": self.causal_lm_class}

    def get_config(self):
        names = inspect.signature(self.config_class.__init__).parameters
        return self.config_class(**{name: getattr(self, name) for name in names if name in vars(self)})

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": input_ids.new_ones(input_ids.shape).tril(),
        }


class CausalLMModelTest(
    ModelTesterMixin, PipelineTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin
):
    model_tester_class = None

    # Class attributes, since upstream declares the first as an abstract property.
    model_tester = pipeline_model_mapping = None

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.all_model_classes = self.model_tester.all_model_classes
        self.pipeline_model_mapping = self.model_tester.pipeline_model_mapping

    def test_config(self):
        ConfigTester(self, config_class=self.model_tester.config_class).run_common_tests()
