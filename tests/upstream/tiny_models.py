"""Models with a tokenizer for the pipeline tests, which otherwise download them from the Hub."""

import argparse
import inspect
import json
import shutil
from pathlib import Path

from transformers import LlamaForCausalLM, LlamaModel

from tinyllama_hf import TinyLlamaForCausalLM
from tinyllama_hf.data.train_tokenizer import train_tokenizer
from tinyllama_hf.modeling_tinyllama import TinyLlamaModel


MODEL_CLASSES = (LlamaModel, LlamaForCausalLM, TinyLlamaModel, TinyLlamaForCausalLM)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_tiny_models(folder: Path) -> None:
    """Writes the models and their list as `utils/create_dummy_models.py` of transformers does."""
    train_tokenizer([inspect.getsource(argparse)], 512, folder / "tokenizer")
    for model_class in MODEL_CLASSES:
        config = model_class.config_class(vocab_size=512, max_position_embeddings=256, **SIZES)
        target = folder / config.model_type / model_class.__name__
        model_class(config).save_pretrained(target)
        shutil.copytree(folder / "tokenizer", target, dirs_exist_ok=True)
    parts = {"tokenizer_classes": ["LlamaTokenizer"], "processor_classes": []}
    (folder / "reports").mkdir()
    summary = json.dumps({model_class.__name__: parts for model_class in MODEL_CLASSES})
    (folder / "reports" / "tiny_model_summary.json").write_text(summary, encoding="utf-8")
