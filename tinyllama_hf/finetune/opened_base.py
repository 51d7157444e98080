"""What every fine-tuning run checks and loads before it reads its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from transformers import AddedToken, AutoConfig, PreTrainedTokenizerFast

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
        max_length (`int`): the largest number of tokens of a conversation.
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
    add_tokens(tokenizer, config)
    template = choose_template(tokenizer, config.chat.template, config.model.path)
    context = AutoConfig.from_pretrained(base, trust_remote_code=False).max_position_embeddings
    max_length, training = config.data.max_length or context, config.training
    if max_length > context:
        raise InputError(f"data.max_length: {max_length} is longer than the model's context of {context}. Lower it")
    tokenizer.model_max_length = context  # saved with the model
    if training.precision == "auto":
        training = training.model_copy(update={"precision": choose_precision()})
    complete = config.model_copy(update={"training": training})
    return OpenedBase(complete, output, base, tokenizer, template, max_length)


def add_tokens(tokenizer: PreTrainedTokenizerFast, config: FinetuneConfig) -> None:
    """Adds the new control tokens of a recipe to a tokenizer.

    Raises:
        InputError: if there are none to add, or the adapter would not train their rows.
    """
    new = config.model.new_tokens
    if known := [token for token in new if token in tokenizer.get_vocab()]:
        raise InputError(
            f"model.new_tokens: {known[0]!r} is in the vocabulary of {config.model.path} already. Remove it"
        )
    needed = {"embed_tokens", "lm_head"} - set(config.adapter.modules_to_save)
    if new and config.adapter.kind != "full" and needed:
        raise InputError(
            f"model.new_tokens: {', '.join(new)} need rows in the embeddings, which adapter.kind "
            f"{config.adapter.kind} does not train. Set adapter.modules_to_save to embed_tokens,lm_head"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
