"""The examples in the docstrings are right."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import dopt_api

MODULES = sorted({module.name for module in pkgutil.walk_packages(dopt_api.__path__, "dopt_api.")})


@pytest.mark.parametrize("name", ["dopt_api", *MODULES])
def test_examples_run(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_the_modules_with_examples_are_found():
    examples = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module("dopt_api.hookspec"))
    assert "dopt_api.quantizer.affine" in MODULES
    assert sum(bool(test.examples) for test in examples) == 6
