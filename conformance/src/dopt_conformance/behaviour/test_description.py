"""What the backend says of itself, and that it asks for its framework only when it needs it."""

import dataclasses
import subprocess
import sys

import pytest

import dopt_api
from dopt_api.types import HOOK_API_VERSION

pytestmark = pytest.mark.since("1.0")


def test_the_description_names_backend_framework_and_versions(harness, info):
    assert info.name == harness.backend
    assert info.framework
    assert info.framework_version, f"{info.framework} is not installed, or its version is not found"
    assert info.version
    assert info.model_types
    assert all("." in name for name in info.model_types), "model types are qualified names"


def test_the_hooks_are_of_a_version_that_this_core_has(info):
    wanted, own = (tuple(map(int, text.split("."))) for text in (info.hook_api_version, HOOK_API_VERSION))
    assert wanted[0] == own[0]
    assert wanted <= own


def test_capabilities_are_frozen(info):
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.capabilities.retraining = True


def test_the_backend_owns_its_models_and_nothing_else(harness, info, main):
    assert info.owns(harness.build(main))
    for other in (object(), "model", 3, None, {}, type(harness.build(main)), harness):
        assert not info.owns(other), f"claims to handle {other!r}"


def test_listing_backends_imports_no_framework(harness, info):
    code = (
        "import sys, dopt_api, dopt_api.facade\n"
        f"before = {info.framework!r} in sys.modules\n"
        f"(status,) = [s for s in dopt_api.backends() if s.name == {harness.backend!r}]\n"
        "assert status.info is not None, status.error\n"
        f"print(before, {info.framework!r} in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split()
    # a framework that the core itself imports (NumPy) is there before any backend is asked
    assert after == before, f"listing the backends imports {info.framework}"


@pytest.mark.parametrize("other", [object(), "model", 3], ids=["object", "str", "int"])
def test_foreign_models_are_declined_by_type(harness, other, tmp_path):
    for backend in (harness.backend, None):
        with pytest.raises(dopt_api.DoptError, match=type(other).__qualname__):
            dopt_api.generate_config(other, None, tmp_path / "config.json", backend=backend)
    assert list(tmp_path.iterdir()) == []
