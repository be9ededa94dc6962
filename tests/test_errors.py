"""Errors are sentences for people and facts for programs, and travel between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from dopt_api import errors
from dopt_api.errors import ConfigError, DoptError, NumbersError, StrategyError, closest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DoptError)]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_are_pickled_with_their_facts(kind, protocol):
    error = kind("It broke", where="here", expected="whole", fix="Mend it.")
    for other in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert (other.what, other.where, other.expected, other.fix) == ("It broke", "here", "whole", "Mend it.")
        assert str(other) == str(error)


@every_kind
def test_every_error_is_exported_and_has_one_tree(kind):
    assert kind.__name__ in errors.__all__
    assert kind.__doc__


def test_kinds_that_callers_catch_by_another_name():
    assert issubclass(NumbersError, ValueError)
    assert issubclass(StrategyError, ConfigError)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({}, "It broke."),
        ({"where": "a.json, line 3"}, "It broke. Where: a.json, line 3."),
        ({"expected": "1", "fix": "Write 1."}, "It broke. Expected: 1. Fix: Write 1."),
        ({"fix": "Did you mean 'a'?"}, "It broke. Fix: Did you mean 'a'?"),
        ({"fix": "Look:\n  ^\n"}, "It broke. Fix: Look:\n  ^\n"),
    ],
)
def test_messages_are_sentences(facts, text):
    assert str(DoptError("It broke", **facts)) == text


def test_closest_names_the_best_match_or_nothing():
    assert closest("tourch", ["tf", "torch"]) == "Did you mean 'torch'?"
    assert closest("xyz", ["tf", "torch"]) == ""
    assert closest("xyz", []) == ""
