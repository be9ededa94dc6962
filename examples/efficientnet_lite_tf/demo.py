"""Quantize EfficientNet-Lite0 in a TensorFlow session: strategy file, calibration, export, and the loss of accuracy.

Run ``make demo-tf``, or with the requirements installed ``python examples/efficientnet_lite_tf/demo.py --help``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only; read when TensorFlow is imported

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from rich.console import Console

from dopt.dopt_tf.opt_main import (
    generate_config_file,
    generate_final_model,
    optimize_model,
    restore_float_checkpoint,
    set_calibrate_state,
)
from dopt_api.params import QuantParams, read_params
from examples.efficientnet_lite import program
from examples.efficientnet_lite.pictures import calibration_pictures, evaluation_pictures
from examples.efficientnet_lite.scores import Logits, score
from examples.efficientnet_lite.steps import Steps, Track
from examples.efficientnet_lite_tf import compare, network

__all__ = ["main", "quantize_and_judge"]

_Pictures = NDArray[np.float32]


def quantize_and_judge(output_dir: Path, range_method: str, steps: Steps, *, threads: int = 2) -> program.Report:
    """Take the network from strategy file to exported model, and compare it with float after each stage.

    Args:
        output_dir: An existing folder for the files.
        range_method: One of the range methods of the strategy file.
        steps: Times the steps and shows their progress.
        threads: Threads for TensorFlow.
    """
    config_file, calibrated = output_dir / "config.json", output_dir / "calibrated.ckpt"
    with steps.step("load weights and pictures"):
        weights, calibration = network.pretrained_weights(), _channels_last(calibration_pictures())
        pictures, labels = evaluation_pictures()
        pictures = _channels_last(pictures)

    with _session(threads) as session:
        with steps.step("build float graph"):
            net = network.build()
            network.load_weights(session, weights)
            float_checkpoint = _save(session, output_dir / "float.ckpt")
        with steps.step("evaluate float") as track:
            reference = _logits(session, net, pictures, track=track)
        with steps.step("write and edit strategy file"):
            generate_config_file(session, config_file)
            program.choose_strategy(config_file, "Quant_INT8-8", range_method)

    with _session(threads) as session:
        with steps.step("optimize"):
            net = network.build()
            is_train = tf.compat.v1.placeholder(tf.bool, [], name="is_train")
            quant = tf.compat.v1.placeholder(tf.int32, [], name="quant")
            optimize_model(session, config_file, is_train, quant)
            restore_float_checkpoint(session, float_checkpoint)
        with steps.step("calibrate") as track:
            set_calibrate_state(session, True)
            for batch in track(_batches(calibration, 32)):
                session.run(net.logits, {net.pictures: batch, is_train: False, quant: 1})
            set_calibrate_state(session, False)
            checkpoint = _save(session, calibrated)
        with steps.step("evaluate float path") as track:
            bypassed = _logits(session, net, pictures, {is_train: False, quant: 0}, track=track)
        with steps.step("evaluate quantized simulation") as track:
            simulated = _logits(session, net, pictures, {is_train: False, quant: 1}, track=track)

    with _session(threads) as session, steps.step("export"):
        output = network.build().logits.op.name
        exported = generate_final_model(
            session,
            config_file=config_file,
            output_name_list=[output],
            ckpt_file=checkpoint,
            output_dir=output_dir,
        )
    with _session(threads) as session, steps.step("evaluate exported graph in TensorFlow") as track:
        deployed = _logits(session, _load(exported.model), pictures, track=track)

    logits = {
        "float": reference,
        "float path (flag 0)": bypassed,
        "quantized simulation": simulated,
        "exported graph": deployed,
    }
    data = sorted(output_dir.glob(f"{calibrated.name}.data-*"))
    return program.Report(
        range_method=range_method,
        scores={name: score(values, reference, labels) for name, values in logits.items()},
        file_bytes={str(path): path.stat().st_size for path in (config_file, *data, exported.model, exported.params)},
        seconds=dict(steps.seconds),
    )


@contextmanager
def _session(threads: int) -> Iterator[Any]:
    """Open a session on the CPU with a new graph, which is the default one."""
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=threads, inter_op_parallelism_threads=1, device_count={"GPU": 0}
    )
    with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
        yield session


def _save(session: Any, path: Path) -> str:
    """Save all variables of a session's graph, and return what to pass for loading them."""
    return str(tf.compat.v1.train.Saver().save(session, str(path), write_meta_graph=False))


def _load(path: Path) -> network.Network:
    """Import a frozen graph into the default graph."""
    graph = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    return network.Network(*tf.import_graph_def(graph, return_elements=["pictures:0", "logits:0"], name=""))


def _logits(
    session: Any,
    net: network.Network,
    pictures: _Pictures,
    flags: Mapping[Any, Any] | None = None,
    *,
    track: Track = iter,
) -> Logits:
    """Return the logits ``[N, classes]`` of a network, with these further values fed."""
    parts = track(_batches(pictures, 20))
    return np.concatenate([session.run(net.logits, {net.pictures: part, **(flags or {})}) for part in parts])


def _batches(pictures: _Pictures, size: int) -> list[_Pictures]:
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


def _channels_last(pictures: _Pictures) -> _Pictures:
    return np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code: 0, or 1 for an error that the user can mend."""
    parser = program.command_line(__doc__, "demo_output/tf", "TensorFlow")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="PARAMS_JSON",
        help="compare the parameters with this file, such as the demo_output/quant_params.json of make demo",
    )
    options = program.parse(parser, argv)
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)

    def body(steps: Steps) -> None:
        others: QuantParams | None = read_params(options.compare) if options.compare else None
        program.make_folder(options.output_dir)
        report = quantize_and_judge(options.output_dir, options.range, steps, threads=options.threads)
        layers = []
        if others is not None:
            layers = compare.compare(read_params(options.output_dir / "quant_params.json"), others)
        if options.json:
            comparison = {"comparison": [asdict(layer) for layer in layers]} if options.compare else {}
            print(json.dumps({**asdict(report), **comparison}, indent=2))
            return
        console = Console()
        program.show(report, console)
        if options.compare:
            compare.show(layers, console)

    return program.run(body)


if __name__ == "__main__":
    sys.exit(main())
