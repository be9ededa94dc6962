"""The command line ``dopt``: one module for each command, imported when the command is called.

It needs the extra ``cli`` (click, Jinja2 for templates, rich for tables); the rest of the core does not.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

EXTRA = ("click", "jinja2", "rich")
"""The modules that the extra brings."""


def main() -> None:
    """Run the command line; where the extra is missing, say how to install it."""
    try:
        from dopt_api.cli.group import dopt  # noqa: PLC0415  # it imports click, which may not be there

        dopt()
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(
            f"Error: The command line needs {error.name}, which is not installed. "
            "Fix: pip install 'dopt-api[cli]' (in a copy of the repository: pip install -e '.[cli]')."
        )
