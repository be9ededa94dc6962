"""Fixtures of the suite's own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from dopt_api.types import BackendInfo
from dopt_conformance.harness import Harness
from dopt_conformance.plugin import HARNESS, INFO
from dopt_conformance.profiles import models_in
from dopt_conformance.way import Deployed, Way


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take a ``name`` with each of the harness's models, or with the first in the profile ``dev``."""
    if "name" in metafunc.fixturenames:
        names = metafunc.config.stash[HARNESS].models()
        metafunc.parametrize("name", names[: models_in(metafunc.config.getoption("--dopt-profile"))], scope="session")


@pytest.fixture(scope="session")
def harness(pytestconfig: pytest.Config) -> Harness:
    """Return the harness of the backend under test."""
    return pytestconfig.stash[HARNESS]


@pytest.fixture(scope="session")
def info(pytestconfig: pytest.Config) -> BackendInfo:
    """Return the description of the backend under test."""
    return pytestconfig.stash[INFO]


@pytest.fixture
def main(harness: Harness) -> str:
    """Return the name of the harness's first model, for what need not be seen on all of them."""
    return harness.models()[0]


@pytest.fixture
def way(harness: Harness, tmp_path: Path) -> Way:
    """Return the way from a model to its exported files, in a folder of its own."""
    return Way(harness, tmp_path)


@pytest.fixture(scope="session")
def deployed(harness: Harness, name: str, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Return a model that went the whole way, all layers quantized; made once and not to be changed."""
    return Way(harness, tmp_path_factory.mktemp("deployed")).deploy(name)
