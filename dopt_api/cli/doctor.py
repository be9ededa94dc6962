"""``dopt doctor``: what is installed, what is in the way, and the command that mends it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module, metadata, util

import click

from dopt_api.cli.output import as_json_option, print_json, print_table

__all__ = ["command"]

OWN = ("dopt-api", "dopt-torch", "dopt-tf", "dopt-conformance")
EXTRAS = {
    "onnx": ("onnx", "dopt convert --to onnx_qdq"),
    "onnxruntime": ("verify", "dopt verify"),
    "safetensors": ("safetensors", "dopt convert --to safetensors"),
    "scipy": ("search", "mixed precision under a budget"),
}
"""Packages that some parts need: the extra that brings them, and the part."""


EXAMPLE = """\b
Example:
  dopt doctor || echo "the last column says what to run"
"""


@click.command("doctor", epilog=EXAMPLE)
@as_json_option
def command(as_json: bool) -> None:
    """Check the installation: exit status 1 if something is broken, with the command that mends it."""
    rows = list(_findings())
    if as_json:
        print_json([dict(zip(("state", "what", "finding", "fix"), row, strict=True)) for row in rows])
    else:
        print_table(("", "what", "finding", "fix"), rows)
    if any(state == "broken" for state, *_ in rows):
        click.get_current_context().exit(1)


def _findings() -> Iterator[tuple[str, str, str, str]]:
    """Yield the state (ok, absent or broken), what was looked at, what was found, and what mends it."""
    from dopt_api.manager import KNOWN, statuses  # noqa: PLC0415  # help does not need it

    yield "ok", "Python", f"{sys.version.split()[0]} ({sys.executable})", ""
    versions = {name: version for name in OWN if (version := _version(name))}
    for name, version in versions.items():
        same = version == versions["dopt-api"]
        fix = "" if same else f"pip install {name}=={versions['dopt-api']}"
        yield "ok" if same else "broken", name, version if same else f"{version}, but dopt-api is another", fix
    yield from _shadow()
    found = statuses()
    for status in found:
        if status.info is None:
            fix = f"pip install --force-reinstall {status.distribution.split(maxsplit=1)[0]}"
            yield "broken", f"backend {status.name}", status.error, fix
        elif status.info.framework_version is None:
            fix = f"pip install '{status.distribution.split(maxsplit=1)[0]}[{status.info.framework}]'"
            yield "broken", f"backend {status.name}", f"{status.info.framework} is not installed", fix
        else:
            yield "ok", f"backend {status.name}", f"{status.info.framework} {status.info.framework_version}", ""
    names = {status.name for status in found}
    for name, distribution in KNOWN.items():
        if name not in names:
            yield "absent", f"backend {name}", "not installed", f"pip install {distribution}"
    for package, (extra, part) in EXTRAS.items():
        if version := _version(package):
            yield "ok", package, version, ""
        else:
            yield "absent", package, f"not installed; {part} needs it", f"pip install 'dopt-api[{extra}]'"


def _shadow() -> Iterator[tuple[str, str, str, str]]:
    """Look whether the namespace ``dopt``, which the vendor's import paths need, belongs to somebody else."""
    if util.find_spec("dopt") is None:
        return
    package = import_module("dopt")
    if package.__file__ is None:  # a namespace, as it should be
        yield "ok", "import dopt", "namespace of the backends", ""
        return
    fix = "pip uninstall dopt" if _version("dopt") else f"rename or remove {package.__file__}"
    yield "broken", "import dopt", f"another package is in the way: {package.__file__}", fix


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
