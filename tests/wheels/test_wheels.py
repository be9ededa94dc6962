"""What is in the built distributions. Run by the tox environment ``wheels``, which builds and installs them."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

DISTRIBUTIONS = ("dopt_api", "dopt_torch", "dopt_tf", "dopt_conformance")
VENDOR_PATHS = ("dopt_torch", "dopt_tf")


def files_of(name: str) -> list[str]:
    (wheel,) = Path(os.environ["DOPT_DIST"]).glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_wheel_makes_the_vendor_namespace_a_package(name):
    assert "dopt/__init__.py" not in files_of(name)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_wheels_hold_their_own_packages_types_and_licence_only(name):
    files = files_of(name)
    tops = {file.split("/")[0] for file in files if ".dist-info/" not in file}
    assert tops == ({name, "dopt"} if name in VENDOR_PATHS else {name})
    assert f"{name}/py.typed" in files
    assert any(file.endswith("LICENSE") for file in files)


def test_the_templates_of_the_scaffold_are_shipped():
    templates = Path(__file__).parents[2] / "dopt_api" / "cli" / "templates"
    wanted = {f"dopt_api/cli/templates/{file.relative_to(templates)}" for file in templates.rglob("*.j2")}
    assert wanted
    assert wanted <= set(files_of("dopt_api"))


def test_what_the_report_is_made_from_is_shipped():
    wanted = {f"dopt_api/report/page.{kind}" for kind in ("html.j2", "css", "js")}
    assert wanted <= set(files_of("dopt_api"))


def test_the_schema_is_shipped_beside_the_reader():
    assert "dopt_api/params/quant_params.schema.json" in files_of("dopt_api")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_source_distributions_build_the_same_package(name):
    (sdist,) = Path(os.environ["DOPT_DIST"]).glob(f"{name}-*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    prefix = "" if name == "dopt_api" else "src/"
    wanted = {prefix + file for file in files_of(name) if ".dist-info/" not in file}
    assert wanted <= inside


def test_all_distributions_have_one_version():
    assert len({metadata.version(name.replace("_", "-")) for name in DISTRIBUTIONS}) == 1


def test_the_installed_wheels_import_from_site_packages_and_find_each_other(tmp_path):
    code = (
        "import dopt, dopt_api, dopt_tf, dopt_torch\n"
        "import dopt.dopt_tf.opt_main as other, dopt.dopt_torch.opt_main as vendor\n"
        "assert not hasattr(dopt, '__file__') or dopt.__file__ is None, dopt\n"
        "assert all('site-packages' in m.__file__ for m in (dopt_api, vendor, other))\n"
        "backends = dopt_api.backends()\n"
        "assert [(b.name, b.error) for b in backends] == [('tf', ''), ('torch', '')], backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
