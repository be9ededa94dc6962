"""``dopt new-backend NAME``: a distribution to fill in, that passes the conformance suite in what it has."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from dopt_api import __version__
from dopt_api.cli.names import check_framework, check_type, names_of
from dopt_api.cli.output import as_json_option, print_json
from dopt_api.errors import OutputError

__all__ = ["command", "new_backend"]


EXAMPLE = """\b
Example:
  dopt new-backend mine --framework numpy --output-dir ..
"""


@click.command("new-backend", epilog=EXAMPLE)
@click.argument("name")
@click.option("--framework", metavar="MODULE", help="What programs import to use the framework.  [default: NAME]")
@click.option(
    "--model-type", metavar="CLASS", help="Qualified name of the class of its models.  [default: MODULE.Model]"
)
@click.option(
    "--output-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path(),
    help="An existing folder, in which the project's own folder is made.  [default: the current one]",
)
@as_json_option
def command(name: str, framework: str | None, model_type: str | None, output_dir: Path, as_json: bool) -> None:
    """Write a new backend, for a framework of your own, to fill in.

    NAME is what the backend is called, such as 'mine': the folder dopt-mine then holds an installable distribution
    with the hooks, a harness for the conformance suite, tests and the list of what is not implemented yet.
    """
    folder, files = new_backend(name, output_dir, framework=framework, model_type=model_type)
    if as_json:
        print_json({"folder": str(folder), "files": files})
        return
    click.echo(f"Written: {folder}")
    for file in files:
        click.echo(f"  {file}")
    if find_spec(module := framework or default_framework(name)) is None:
        click.echo(
            f"\nNote: {module!r} is not installed here, and the suite needs it. "
            "Install it, or start anew with the option --framework."
        )
    click.echo(
        f"\nNext:\n  cd {folder}\n  pip install -e '.[test]'\n"
        f"  pytest --pyargs dopt_conformance --dopt-backend {name}\n"
        "Its README.md says in which order to fill it in."
    )


def new_backend(
    name: str, output_dir: Path, *, framework: str | None = None, model_type: str | None = None
) -> tuple[Path, list[str]]:
    """Write the project of a new backend, whole or not at all.

    Args:
        name: The backend's name.
        output_dir: An existing folder, in which the project's folder is made.
        framework: The framework's import name; by default the backend's name.
        model_type: The qualified name of the class of models; by default ``Model`` of the framework.

    Returns:
        The folder, and the paths of the files in it.

    Raises:
        BackendError: The name, the framework or the type is no valid one.
        OutputError: The folder exists already or cannot be written.
    """
    from dopt_api.cli.rendering import render_folder  # noqa: PLC0415  # what is slow to import, help does not need
    from dopt_api.types import HOOK_API_VERSION  # noqa: PLC0415

    names = names_of(name)
    module = check_framework(framework or default_framework(name))
    minor = ".".join(__version__.split(".")[:2])
    following = f"{minor.split('.')[0]}.{int(minor.split('.')[1]) + 1}"
    texts = render_folder(
        "backend",
        {
            **vars(names),
            "framework": module,
            "model_type": check_type(model_type or f"{module}.Model"),
            "requires": f">={minor},<{following}",
            "hook_api_version": HOOK_API_VERSION,
        },
    )
    return _write(output_dir / names.distribution, texts), list(texts)


def default_framework(name: str) -> str:
    """Return what is imported to use a framework that is called as its backend is."""
    return name.replace("-", "_")


def _write(target: Path, texts: dict[str, str]) -> Path:
    """Write a folder of texts aside and rename it into place."""
    if target.exists():
        raise OutputError(
            f"{str(target)!r} exists already",
            where=str(target.absolute()),
            expected="a name that is not taken",
            fix="Remove it, choose another NAME, or pass another --output-dir.",
        )
    if not target.parent.is_dir():
        raise OutputError(
            f"The folder {str(target.parent)!r} does not exist",
            where=str(target.parent.absolute()),
            expected="an existing folder",
            fix="Create it, or pass another --output-dir.",
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".dopt-", dir=target.parent) as aside:
            project = Path(aside) / target.name
            for path, text in texts.items():
                file = project / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8", newline="\n")
            project.rename(target)
    except OSError as error:
        raise OutputError(
            f"Writing {str(target)!r} failed: {error.strerror or error}",
            where=str(target.absolute()),
            expected="a writable folder with enough free space",
            fix="Pass another --output-dir; nothing was left half-written.",
        ) from error
    return target
