"""``dopt backends``: which backends are installed, and whether they load."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dopt_api.cli.output import as_json_option, print_json, print_table

if TYPE_CHECKING:
    from dopt_api.manager import BackendStatus

__all__ = ["command"]


EXAMPLE = """\b
Example:
  dopt backends --json
"""


@click.command("backends", epilog=EXAMPLE)
@as_json_option
def command(as_json: bool) -> None:
    """List the installed backends, with their frameworks; none of these is imported."""
    from dopt_api.manager import KNOWN, statuses  # noqa: PLC0415  # help does not need it

    found = statuses()
    if as_json:
        print_json([asdict(status) for status in found])
        return
    if not found:
        known = ", ".join(f"pip install {name}" for name in KNOWN.values())
        click.echo(f"No backend is installed. Fix: {known}.")
        return
    print_table(("backend", "distribution", "framework", "can", "problem"), map(_row, found))


def _row(status: BackendStatus) -> tuple[str, ...]:
    if status.info is None:
        return status.name, status.distribution, "", "", status.error
    framework = f"{status.info.framework} {status.info.framework_version or '(not installed)'}"
    claimed: dict[str, Any] = asdict(status.info.capabilities)
    return status.name, status.distribution, framework, ", ".join(key for key, can in claimed.items() if can), ""
