"""How thoroughly the suite tries a backend."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

__all__ = ["PROFILES", "load_profile", "models_in"]

PROFILES = ("dev", "ci", "nightly")
"""``dev``: a minute's work, one model. ``ci``: all models, and the same examples every time. ``nightly``: an hour's."""

_EXAMPLES = {"dev": 25, "ci": 150, "nightly": 5000}


def models_in(profile: str) -> int | None:
    """Return how many of the harness's models a profile goes the whole way with; all if ``None``."""
    return 1 if profile == "dev" else None


def load_profile(name: str) -> None:
    """Make one of :data:`PROFILES` the profile of hypothesis."""
    settings.register_profile(
        f"dopt-{name}",
        max_examples=_EXAMPLES[name],
        deadline=None,  # the first call of a kernel may compile it
        derandomize=name == "ci",
        database=None if name == "ci" else settings.default.database if settings.default else None,
        report_multiple_bugs=False,  # so that the exception of a known gap is itself and no group of several
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile(f"dopt-{name}")
