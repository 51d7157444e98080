"""The jinja2 templates of cards and pages, which are files next to the code that renders them."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ..portable import portable_text


def render_template(path: Path, **values: Any) -> str:
    """Renders a template of the package.

    Templates of HTML escape what they are given. Filters: `number(spec)` formats as Python does, with separators of
    thousands by default; `cell` escapes text for a Markdown table; `portable` cuts absolute paths;
    `basename` gives the last part of a path.

    Args:
        path (`Path`): the template.
        **values: that it names; one that is missing is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, cell=_cell, portable=portable_text, basename=_basename)
    return environment.get_template(path.name).render(values)


def _number(value: float, spec: str = ",") -> str:
    return format(value, spec)


def _basename(path: str) -> str:
    return Path(path).name


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
