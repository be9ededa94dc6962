"""The group of all commands, which imports a command's module only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from dopt_api import __version__
from dopt_api.errors import DoptError, closest

__all__ = ["COMMANDS", "Group", "dopt"]

COMMANDS = {
    "backends": "dopt_api.cli.backends",
    "config": "dopt_api.cli.config",
    "convert": "dopt_api.cli.convert",
    "doctor": "dopt_api.cli.doctor",
    "new-backend": "dopt_api.cli.new_backend",
    "params": "dopt_api.cli.params",
    "quantize": "dopt_api.cli.quantize",
    "report": "dopt_api.cli.report",
    "tune": "dopt_api.cli.tune",
    "verify": "dopt_api.cli.verify",
}
"""The module of each command. It has the command under the name ``command``, and imports what is slow inside it."""


class Group(click.Group):
    """The commands of :data:`COMMANDS`; errors of the toolkit are shown as sentences, with exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names for the help text."""
        return sorted({*COMMANDS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called, or say which one may be meant."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = closest(args[0], self.list_commands(ctx)) or f"Call {ctx.command_path} --help for the commands."
            ctx.fail(f"There is no command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except DoptError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="dopt-api")
def dopt() -> None:
    """Neural-network quantization inside your own training project."""
