"""Rendering of the jinja2 templates of model cards and the run report."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ..portable import portable_text


def render_template(path: Path, **values: Any) -> str:
    """Renders a template file. Values are escaped in HTML templates.

    Filters besides those of jinja2: `number(spec)` formats a number with a Python format spec, by default with
    thousands separators; `cell` escapes text for a Markdown table; `portable` shortens absolute paths; `basename` is
    the last part of a path.

    Args:
        path (`Path`): the template.
        **values: values of the variables in the template. A missing one is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=lambda value, spec=",": format(value, spec),
        cell=lambda text: text.replace("|", "\\|"),
        portable=portable_text,
        basename=lambda path: Path(path).name,
    )
    return environment.get_template(path.name).render(values)
