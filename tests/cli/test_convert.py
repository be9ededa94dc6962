"""``dopt convert``: through the command line to files, names and sentences."""

import json

from click.testing import CliRunner

from dopt_api.cli.group import dopt
from dopt_api.params import QuantParams, render_params


def call(*arguments):
    return CliRunner().invoke(dopt, ["convert", *map(str, arguments)])


def export(folder):
    (folder / "quant_params.json").write_text(render_params(QuantParams("model.other", ())))
    (folder / "model.other").write_bytes(b"graph")


def test_a_folder_or_its_file_is_converted(tmp_path):
    export(tmp_path)
    (tmp_path / "deploy").mkdir()
    result = call(tmp_path, "--to", "csv", "--output-dir", tmp_path / "deploy")
    assert (result.exit_code, result.output) == (0, f"csv: {tmp_path / 'deploy' / 'quant_params.csv'}\n")
    result = call(tmp_path / "quant_params.json", "--to", "csv", "--json")
    assert json.loads(result.output) == {"csv": [str(tmp_path / "quant_params.csv")]}


def test_formats_are_listed_and_asked_for(tmp_path):
    export(tmp_path)
    assert call("--list").output.split()[:2] == ["onnx_qdq", "aimet_encodings"]
    result = call(tmp_path)
    assert result.exit_code == 2
    assert "--to amct_record or --to csv" in result.output


def test_what_is_wrong_is_a_sentence_and_exit_status_1(tmp_path):
    export(tmp_path)
    for arguments, what in (
        ((tmp_path, "--to", "onnx_qdq"), "no way from 'model.other' to ONNX"),
        ((tmp_path, "--to", "cvs"), "Did you mean 'csv'?"),
        ((tmp_path / "nothing.json", "--to", "csv"), "cannot be read"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1
        assert what in result.output
        assert "Traceback" not in result.output
