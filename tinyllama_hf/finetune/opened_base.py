"""What every fine-tuning run checks and loads before it reads its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from transformers import AutoConfig, PreTrainedTokenizerFast

from ..chat.templates import choose_template
from ..devices import choose_precision
from ..errors import InputError, require
from ..inference.load import model_folder
from ..progress import quiet_bitsandbytes
from ..tokenization_tinyllama import load_tokenizer
from .config import FinetuneConfig
from .trainer import check_machine
from .tuned_folder import check_run_folder


Config = TypeVar("Config", bound=FinetuneConfig)


@dataclass(frozen=True)
class OpenedBase(Generic[Config]):
    """A recipe without values that are left to the machine, and what [`OpenedRun`] has under the same names.

    Attributes:
        max_length (`int`): the longest conversation.
    """

    config: Config
    output: Path
    base: Path
    tokenizer: PreTrainedTokenizerFast
    template: str
    max_length: int


def open_base(config: Config, overwrite: bool) -> OpenedBase[Config]:
    """Checks machine, output and base model of a recipe, and loads the tokenizer.

    Raises:
        InputError: if one of them cannot be used, or a package is not installed.
    """
    quiet_bitsandbytes()  # which peft imports
    require("trl", "finetune", "fine-tuning")
    require("peft", "finetune", "fine-tuning")
    check_machine(config)
    output = check_run_folder(Path(config.output_dir), overwrite)
    base = model_folder(config.model.path)
    tokenizer = load_tokenizer(base)
    template = choose_template(tokenizer, config.chat.template, config.model.path)
    context = AutoConfig.from_pretrained(base, trust_remote_code=False).max_position_embeddings
    max_length, training = config.data.max_length or min(context, 2048), config.training
    if max_length > context:
        raise InputError(f"data.max_length: {max_length} is longer than the model's context of {context}. Lower it")
    tokenizer.model_max_length = context  # saved with the model
    if training.precision == "auto":
        training = training.model_copy(update={"precision": choose_precision()})
    data = config.data.model_copy(update={"max_length": max_length})
    complete = config.model_copy(update={"data": data, "training": training})
    return OpenedBase(complete, output, base, tokenizer, template, max_length)
