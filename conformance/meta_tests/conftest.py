"""What the tests of the suite share: backends and harnesses that are installed for one test."""

from __future__ import annotations

import pytest
from installed import Installer

from dopt_api import manager


@pytest.fixture
def install(tmp_path_factory, monkeypatch):
    """Return a function that installs a backend called ``mine``, see :class:`installed.Installer`."""
    manager._loaded.cache_clear()
    yield Installer(tmp_path_factory.mktemp("site"), monkeypatch)
    manager._loaded.cache_clear()
