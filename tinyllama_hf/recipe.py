"""Reads a recipe, the YAML file of a training run, and reports all its problems at once.

Nothing else is loaded before the recipe is valid.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails

from .errors import InputError, check_seed, did_you_mean
from .text import read_text


Seed = Annotated[int, AfterValidator(lambda seed: check_seed(seed, ""))]


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


Recipe = TypeVar("Recipe", bound=Section)


def read_recipe(
    schema: type[Recipe],
    path: str | os.PathLike,
    overrides: Sequence[str],
    contradictions: Callable[[Mapping[str, Any]], Iterable[str]],
) -> Recipe:
    """Reads a recipe and applies `section.key=value` overrides.

    Args:
        schema (`type[Section]`): schema of the file.
        path (`str` or `os.PathLike`): the YAML file.
        overrides (`Sequence[str]`): values to replace.
        contradictions (`Callable`): gives the problems between keys, from the valid sections.

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
