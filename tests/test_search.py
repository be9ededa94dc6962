"""The search for strategies under a budget: exact, for any numbers."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopt_api.errors import SearchError
from dopt_api.search import Choice, choose, trade_off

numbers = st.integers(0, 2000).map(lambda number: number / 8)  # sums are exact, so that equal is equal
problems = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5)


def choices_of(problem):
    return [
        Choice(f"layer{i}", f"strategy{j}", damage, cost)
        for i, options in enumerate(problem)
        for j, (damage, cost) in enumerate(options)
    ]


@settings(deadline=None)
@given(problem=problems, share=st.floats(0, 1))
def test_no_other_choice_within_the_budget_is_better(problem, share):
    least, most = (sum(end(cost for _, cost in options) for options in problem) for end in (min, max))
    budget = least + share * (most - least)
    point = choose(choices_of(problem), budget)
    assert list(point.strategies) == [f"layer{i}" for i in range(len(problem))]
    taken = [options[int(point.strategies[f"layer{i}"][8:])] for i, options in enumerate(problem)]
    assert point.damage == sum(damage for damage, _ in taken)
    assert point.cost == sum(cost for _, cost in taken)
    assert point.cost <= budget * (1 + 1e-6) + 1e-6
    every = itertools.product(*problem)
    best = min(sum(d for d, _ in one) for one in every if sum(c for _, c in one) <= budget)
    assert point.damage == pytest.approx(best, rel=1e-5, abs=1e-4)


def test_more_budget_never_does_more_damage():
    problem = [[(8.0 / (j + 1) + i, 100.0 * (j + 1) * (i + 1)) for j in range(4)] for i in range(30)]
    points = trade_off(choices_of(problem), [46500.0 * share for share in (1, 1.5, 2, 3, 4)])
    damages = [point.damage for point in points]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > damages[-1]


def test_two_thousand_layers_are_no_trouble():
    problem = [[(1.0 + (i * 37 % 101) / j, 64.0 * j * (1 + i % 7)) for j in (8, 7, 4)] for i in range(2000)]
    point = choose(choices_of(problem), 0.75 * sum(options[0][1] for options in problem))
    assert len(point.strategies) == 2000


@pytest.mark.parametrize(
    ("choices", "budget", "what"),
    [
        ([], 1.0, "nothing to choose from"),
        ([Choice("fc", "Quant_INT8-8", -1.0, 1.0)], 1.0, "damage of 'Quant_INT8-8' is -1.0"),
        ([Choice("fc", "Quant_INT8-8", 1.0, float("nan"))], 1.0, "cost of 'Quant_INT8-8' is nan"),
        ([Choice("fc", "Quant_INT8-8", 1.0, 5.0)], 4.0, "cheapest strategies cost 5 together"),
        ([Choice("fc", "Quant_INT8-8", 1.0, 5.0)], float("nan"), "cannot be kept"),
    ],
)
def test_what_cannot_be_chosen_is_said(choices, budget, what):
    with pytest.raises(SearchError, match=what):
        choose(choices, budget)


def test_without_scipy_it_says_how_to_install_it():
    code = (
        "import sys; sys.modules['scipy'] = None; sys.modules['scipy.optimize'] = None\n"
        "from dopt_api.search import Choice, choose\n"
        "try: choose([Choice('fc', 'float', 1.0, 1.0)], 2.0)\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dopt-api[search]'" in done.stdout
