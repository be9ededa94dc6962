"""Rendering a folder of templates to the texts of a project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jinja2

__all__ = ["render_folder"]

SUFFIX = ".j2"


def render_folder(name: str, values: Mapping[str, object]) -> dict[str, str]:
    """Return the texts of a project by their paths within it, from ``templates/<name>``.

    Names of files and folders are templates too; the files' suffix ``.j2`` is dropped.

    Args:
        name: The folder of templates.
        values: What the templates speak of; one that they need and that is not there is an error.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  # what is rendered is no HTML
    )
    root = Path(__file__).parent / "templates" / name
    return {
        environment.from_string(file.relative_to(root).as_posix()).render(values).removesuffix(SUFFIX): (
            environment.from_string(file.read_text(encoding="utf-8")).render(values)
        )
        for file in sorted(root.rglob(f"*{SUFFIX}"))
    }
