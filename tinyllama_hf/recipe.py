"""Reads a recipe, the YAML file of a training run, and reports all its problems at once.

Nothing else is loaded before the recipe is valid.
"""

import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from .errors import InputError, check_seed, did_you_mean
from .text import read_text


_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?) ?([kKMBT]?)")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> Any:
    """Returns `300M`, `1.5B` or `1e9` as an integer, and values other than strings unchanged.

    Raises:
        ValueError: for any other string.
    """
    if not isinstance(value, str):
        return value
    match = _COUNT.fullmatch(value)
    count = Decimal(match[1]) * _UNITS[match[2]] if match else Decimal("0.5")
    if count != int(count):
        raise ValueError("write a whole number, such as 300_000, 300k or 2B")
    return int(count)


Seed = Annotated[int, AfterValidator(lambda seed: check_seed(seed, ""))]
TokenCount = Annotated[int, BeforeValidator(parse_count)]


def split_names(value: Any) -> Any:
    """Returns `a,b` of an override as a list, and values other than strings unchanged."""
    return value.split(",") if isinstance(value, str) else value


Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(split_names)]


class Section(BaseModel):
    """A section of a recipe. Unknown keys are errors."""

    # "forbid" makes a misspelled key an error; protected_namespaces would forbid names that start with model_.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _integers_are_small(cls, value: Any) -> Any:
        """Rejects integers that would overflow later, in arithmetic with floats or tensors."""
        for number in _integers(value):
            if abs(number) >= 2**64:
                raise ValueError(f"{number} is too large; integers have at most 64 bits")
        return value


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)


class RecipeFile(Section):
    """A whole recipe, which knows the keys that its file and the overrides set."""

    _given: frozenset[str] = PrivateAttr(default=frozenset())

    def to_yaml(self) -> str:
        """The recipe with its overrides applied, and all defaults."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)

    def describe_defaults(self) -> list[str]:
        """Lines with the keys that the recipe leaves out, and their values."""
        values = _flatten(self.model_dump(mode="json", by_alias=True))
        left_out = [f"{key} {json.dumps(value)}" for key, value in values.items() if key not in self._given]
        # No-break spaces keep a key and its value on one line.
        text = ", ".join(item.replace(" ", "\xa0") for item in left_out)
        wrapper = textwrap.TextWrapper(119, "defaults    ", " " * 12, break_long_words=False, break_on_hyphens=False)
        lines = wrapper.wrap(text)
        return [line.replace("\xa0", " ") for line in lines]


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe by `section.key`."""
    flat: dict[str, Any] = {}
    for name, section in recipe.items():
        keys = {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {}
        flat |= keys or {name: section}
    return flat


Recipe = TypeVar("Recipe", bound=RecipeFile)


def read_recipe(
    schema: type[Recipe],
    path: str | os.PathLike,
    overrides: Sequence[str],
    contradictions: Callable[[Mapping[str, Any]], Iterable[str]],
    fill_in: Callable[[dict[str, Any]], None] | None = None,
) -> Recipe:
    """Reads a recipe and applies `section.key=value` overrides.

    Args:
        schema (`type[RecipeFile]`): schema of the file.
        path (`str` or `os.PathLike`): the YAML file.
        overrides (`Sequence[str]`): values to replace.
        contradictions (`Callable`): gives the problems between keys, from the valid sections.
        fill_in (`Callable`, *optional*): adds the keys that the file leaves out and whose values follow from others.

    Raises:
        InputError: lists every unknown key (with the closest valid one), wrong type, value out of range and
            contradiction in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"recipe {path} does not exist; `tinyllama-hf recipes list` lists the bundled recipes")
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    given = frozenset(_flatten(values))
    if fill_in:
        fill_in(values)
    recipe, errors = None, []
    try:
        recipe = schema.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
    sections = _valid_sections(schema, values, errors)
    problems = [*(_problem(schema, error) for error in errors), *contradictions(sections)]
    if recipe is None or problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        where = f"{path} with {' '.join(overrides)}" if overrides else path
        raise InputError(f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{lines}")
    recipe._given = given
    return recipe


def _valid_sections(schema: type[Recipe], values: dict[str, Any], errors: list[ErrorDetails]) -> dict[str, Any]:
    """Returns the sections that have no error."""
    broken = {error["loc"][0] for error in errors}
    return {
        name: section.model_validate(values[name])
        for name, field in schema.model_fields.items()
        if (section := _section_of(field.annotation)) and name not in broken and values.get(name) is not None
    }


def _section_of(annotation: Any) -> type[Section] | None:
    """Returns the section type of a field, or `None` for a plain value."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not key:
        raise InputError(f"override {override!r}: write section.key=value, for example training.seed=1")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: its value is not valid YAML: {error}") from error


def _problem(schema: type[Recipe], problem: ErrorDetails) -> str:
    """Formats an error of pydantic as one line."""
    *sections, key = problem["loc"]
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden" and not sections:
        kinds = {section: _section_of(field.annotation) for section, field in schema.model_fields.items()}
        places = [f"{section}.{key}" for section, kind in kinds.items() if kind and key in kind.model_fields]
        if places:
            return f"{name}: unknown key; did you mean {' or '.join(places)}?"
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key{did_you_mean(str(key), _fields(schema, sections))}"
    if problem["type"] == "missing":
        return f"{name}: is required"
    message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix for our own checks
    return f"{name}: {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _fields(schema: type[Recipe], sections: Sequence[str | int]) -> list[str]:
    model: Any = schema
    for section in sections:
        if isinstance(section, str):
            model = _section_of(model.model_fields[section].annotation)
    return [field.alias or name for name, field in model.model_fields.items()]
