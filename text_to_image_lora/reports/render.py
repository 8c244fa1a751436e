"""Renders the pages: a template with its data, its style and its script in a single file that needs no network."""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .private_folders import hide_parents


TEMPLATES = Path(__file__).parent / "page"


def render(path: Path, template: str, *, folders: Sequence[str], styles: Sequence[str], **values: Any) -> None:
    """Renders a template and writes the page, whole or not at all.

    `styles` are the style sheets in `page/`. `folders` are removed from the paths on the page, see `private_folders.py`.
    """
    from markupsafe import Markup

    css = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in styles)
    written = time.strftime("%Y-%m-%d %H:%M")
    page = _environment().get_template(template)
    write_whole(path, page.render(private_folders=folders, css=Markup(css), written=written, **values))


def script(name: str) -> Any:
    """Returns a script in `page/`, for a template."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def data(value: Any, folders: Sequence[str] = ()) -> Any:
    """Returns a value as the JSON of a `<script type="application/json">` element, without the names of these folders."""
    from markupsafe import Markup

    text = hide_parents(json.dumps(value), folders)
    return Markup(text.replace("<", "\\u003c"))  # "</script>" in a name would end the script


@functools.cache
def _environment():
    """Returns the environment of the templates, which compiles each of them once: a run's page is written many times."""
    import jinja2

    @jinja2.pass_context
    def without_private_folders(context, value):
        return hide_parents(value, context["private_folders"])

    # Everything that a template prints is escaped, such as captions, prompts and file names.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=without_private_folders,
    )  # fmt: skip
    environment.filters["shown"] = format_setting
    return environment


def format_setting(value: Any) -> str:
    """Formats the value of a setting as on the command line and in run.yaml."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(format_setting, value)) if isinstance(value, list | tuple) else str(value)
