"""``dopt quantize FACTORY CONFIG OUTPUT_DIR``: from a float model and data to the exported files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dopt_api.cli.factories import Batches, call_factory, data_factory_option
from dopt_api.cli.output import as_json_option, make_folder, print_json

__all__ = ["command"]

EXAMPLES = """\b
Example:
  dopt config new my_project.models:build config.json --input-shape x:1,3,224,224
  dopt config set config.json --strategy Quant_INT8-8
  dopt quantize my_project.models:build config.json output --data my_project.data:batches --format onnx_qdq
"""


@click.command("quantize", epilog=EXAMPLES)
@click.argument("factory", metavar="FACTORY")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("output_dir", type=click.Path(path_type=Path, file_okay=False))
@data_factory_option
@click.option("--format", "formats", multiple=True, metavar="NAME", help="A format to write as well (dopt convert).")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="How many samples the rounding of weights looks at.",
)
@click.option("--short-sums", is_flag=True, help="For processors with AVX2 and without VNNI (docs/formats.md).")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    help="The time for the rounding; layers left over are rounded to nearest.",
)
@click.option("--output-name", "output_names", multiple=True, metavar="NAME", help="An output of the written graph.")
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size of the written graph open.")
@click.option("--backend", metavar="NAME", help="The backend.  [default: that of the model's type]")
@as_json_option
def command(
    factory: str,
    config: Path,
    output_dir: Path,
    data: str,
    formats: tuple[str, ...],
    samples: int,
    short_sums: bool,
    seconds: float | None,
    output_names: tuple[str, ...],
    dynamic_batch: bool,
    backend: str | None,
    as_json: bool,
) -> None:
    """Quantize a trained model without retraining: calibrate it, round its weights, export it.

    FACTORY is package.module:function, which returns the float model with its weights, or a session of its graph; it
    is called twice. CONFIG is the strategy file, and OUTPUT_DIR the folder for all that is written, made if it is not
    there. After an interruption, the same command goes on, and ends with the same files.
    """
    from dopt_api import extensions, facade, manager  # noqa: PLC0415  # help does not need it
    from dopt_api.formats import get_format  # noqa: PLC0415  # likewise
    from dopt_api.report.notes import write_quantization  # noqa: PLC0415  # likewise

    for name in formats:
        get_format(name)  # what cannot be written is said before the work
    model = call_factory(factory)
    chosen = manager.select(model, backend)
    plan = facade.check(model, config, backend=chosen.name)
    if not plan.quantized:
        raise click.ClickException(
            f"Every layer in {config} is 'float'. Fix: dopt config set {config} --strategy Quant_INT8-8 (or another)."
        )
    try:
        calibrate, _ = extensions.load(extensions.POST_TRAINING, chosen.name)
    except KeyError:
        raise click.ClickException(
            f"The backend {chosen.name!r} has no post-training of its own: calibrate in a script instead."
        ) from None
    batches = Batches(data)
    folder = make_folder(output_dir / "checkpoint")
    with batches.told():
        checkpoint, layers, *more = calibrate(
            model,
            config,
            batches,
            folder,
            samples=samples,
            short_sums=short_sums,
            seconds=seconds,
            progress=_Progress(),
        )
    result = facade.export(
        call_factory(factory),
        config,
        checkpoint,
        output_dir,
        output_names=list(output_names) or None,
        dynamic_batch=dynamic_batch,
        formats=formats,
        backend=chosen.name,
    )
    notes = write_quantization(output_dir, plan, chosen.info, layers, more[0] if more else {})
    files = [result.model, result.params, *result.others, notes, *_take_tuning(config, output_dir)]
    if as_json:
        print_json({"files": [str(file) for file in files], "layers": [asdict(layer) for layer in layers]})
        return
    left = Counter(layer.reason for layer in layers if layer.reason)
    click.echo(f"{len(layers)} layers quantized, the weights of {len(layers) - left.total()} rounded for the outputs")
    for reason, count in left.items():
        click.echo(f"{count} rounded to nearest: {reason}")
    for file in files:
        click.echo(file)


def _take_tuning(config: Path, folder: Path) -> list[Path]:
    """Copy what ``dopt tune`` left beside the strategy file to where a report finds it."""
    from dopt_api.files import write_text  # noqa: PLC0415  # help does not need it
    from dopt_api.report.notes import TUNING, tuning_beside  # noqa: PLC0415  # likewise

    file = tuning_beside(config)
    return [write_text(folder / TUNING, file.read_text(encoding="utf-8"))] if file.is_file() else []


class _Progress:
    """Bars on a terminal, first for the batches and then for the layers."""

    def __init__(self) -> None:
        self.names = iter(("calibrating", "rounding"))

    def __call__(self, steps: Iterable[Any]) -> Iterable[Any]:
        from rich.console import Console  # noqa: PLC0415  # help does not need it
        from rich.progress import track  # noqa: PLC0415  # likewise

        console = Console(stderr=True)
        return track(steps, next(self.names, ""), console=console, disable=not sys.stderr.isatty())
