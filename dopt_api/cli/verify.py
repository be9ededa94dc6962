"""``dopt verify PARAMS``: whether the integer model computes what was simulated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dopt_api.cli.output import print_table

if TYPE_CHECKING:
    from dopt_api.formats.integer_nodes import NodeKind
    from dopt_api.verify import LayerCheck

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["command", "data_option", "read_arrays"]


def data_option(default: str) -> Callable[[F], F]:
    """Return the option ``--data``, the same for each command that runs the model."""
    return click.option(
        "--data",
        type=click.Path(path_type=Path),
        help=f"An .npz file with an array for each input of the model.  [default: {default}]",
    )


EXAMPLES = """\b
Examples:
  dopt verify output
  dopt verify output --data batch.npz --min-sqnr 20 --picture layers.png
"""


@click.command("verify", epilog=EXAMPLES)
@click.argument("params", type=click.Path(path_type=Path))
@data_option("made up")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="A picture to draw: .png, .svg or .pdf (needs Matplotlib)."
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The float network as ONNX, before quantization: shows what the weights lose as well.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Exit with status 1 below so many dB at the outputs.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print what was found as JSON; null for dB where nothing differs."
)
def command(
    params: Path,
    data: Path | None,
    picture: Path | None,
    reference: Path | None,
    min_sqnr: float | None,
    as_json: bool,
) -> None:
    """Run an export in float and in integers and compare, layer by layer, most damaged first.

    PARAMS is the quant_params.json of an export, with its model beside it, or the folder of both. Float is the
    exported graph, whose weights lie on their grids; what they lose is seen with --reference.
    """
    try:
        from dopt_api.verify import verify  # noqa: PLC0415  # help does not need it
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"dopt verify needs {error.name}, which is not installed. Fix: pip install 'dopt-api[verify]'."
        ) from error
    file = params / "quant_params.json" if params.is_dir() else params
    found = verify(file, None if data is None else [read_arrays(data)], reference=reference)
    if picture is not None:
        from dopt_api.plots import plot_verification  # noqa: PLC0415  # an extra

        plot_verification(found, picture)
    if as_json:
        content = asdict(found)
        for layer in content["layers"]:
            del layer["inputs"]  # long, and for the report
        click.echo(json.dumps(_finite(content), indent=2, allow_nan=False))
    else:
        columns = ("layer", "SQNR dB", "cosine", "clipped", "hazard", "off")
        worst_first = sorted(found.layers, key=lambda one: one.sqnr_db)
        print_table(columns, map(_row, worst_first), right=columns[1:])
        if data is None:
            click.echo("\nThe data are made up, which is harder on a network than real ones: give some by --data.")
        click.echo(f"\noutputs against float: {found.sqnr_db:.2f} dB, cosine {found.cosine:.5f}")
        click.echo(f"with all optimizations: {found.optimized_db:.2f} dB; against without: {found.kernels_db:.2f} dB")
        if found.reference_db is not None:
            click.echo(f"with all optimizations against {reference}: {found.reference_db:.2f} dB")
        click.echo("kernels: " + ", ".join(f"{count} {kind}" for kind, count in found.kernels.items()))
        _show_nodes(found.nodes)
        if "MatMulNBits" in found.kernels:
            click.echo(
                "\nMatMulNBits quantizes float inputs to 8 bits. To keep them float, as simulated, set\n"
                "the session's option session.qdq_matmulnbits_accuracy_level to 1."
            )
        if any(layer.hazard for layer in found.layers):
            click.echo(
                "\nhazard: on processors with AVX2 and without VNNI, sums of two products can overflow 16 bits in the\n"
                "share of channels shown. For such targets, round the weights for it (dopt quantize --short-sums, or\n"
                "post_training's short_sums=True), or give these layers the strategy 'Quant_INT8-7'."
            )
    against = found.optimized_db if found.reference_db is None else found.reference_db
    worst = min(found.sqnr_db, found.optimized_db, against)
    if min_sqnr is not None and not worst >= min_sqnr:
        raise click.ClickException(f"The outputs have {worst:.2f} dB, less than --min-sqnr {min_sqnr:g}.")


def _show_nodes(nodes: Sequence[NodeKind]) -> None:
    """Show how many nodes run in integers, and why others that multiply do not."""
    from dopt_api.formats.integer_nodes import MULTIPLYING, summary  # noqa: PLC0415  # needs onnx

    click.echo(summary(nodes))
    left = [node for node in nodes if node.op_type in MULTIPLYING and not node.integer]
    if left:
        click.echo()
        print_table(("float node", "layer", "why"), ((node.node, node.layer, node.reason) for node in left))


def _row(layer: LayerCheck) -> tuple[object, ...]:
    off = "" if layer.off is None else layer.off
    return layer.name, f"{layer.sqnr_db:.2f}", f"{layer.cosine:.5f}", f"{layer.clipped:.2%}", f"{layer.hazard:.1%}", off


def _finite(value: Any) -> Any:
    """Return the value with ``None`` for infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_arrays(file: Path) -> dict[str, Any]:
    """Return the arrays of an ``.npz`` file by name."""
    import numpy as np  # noqa: PLC0415  # help does not need it

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise click.ClickException(
            f"The data {str(file)!r} cannot be read as .npz{why}. Expected: a file of numpy.savez, with an array "
            f"for each input of the model. Fix: numpy.savez({str(file.with_suffix('.npz'))!r}, x=batch)."
        ) from error
