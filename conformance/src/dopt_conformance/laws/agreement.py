"""When the integers of a backend agree with the reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dopt_api.quantizer import fake_quantize
from dopt_conformance.laws.drawing import Case

__all__ = ["assert_agrees"]

ULPS = 4
"""How near to a tie, in units in the last place of ``x / scale``, a backend that multiplies may decide otherwise."""


def assert_agrees(found: NDArray[np.float32], case: Case) -> None:
    """Check that values are the reference's to the bit, or one step beside it where ``x / scale`` is all but a tie."""
    assert found.dtype == np.float32, f"the result is {found.dtype}, not float32"
    assert found.shape == case.x.shape, f"the result has the shape {found.shape}, not {case.x.shape}"
    wanted = fake_quantize(case.x, case.scale, case.zero_point, case.grid, axis=case.axis)
    different = found != wanted
    if not different.any():
        return
    scale = np.broadcast_to(case.on_data(case.scale), case.x.shape)[different].astype(np.float64)
    steps = case.x[different].astype(np.float64) / scale
    from_tie = np.abs(steps - np.floor(steps) - 0.5)
    near = from_tie <= ULPS * np.spacing(np.abs(steps).astype(np.float32))
    one_step = np.abs(found[different].astype(np.float64) - wanted[different]) <= 1.0001 * scale
    wrong = ~(near & one_step)
    assert not wrong.any(), (
        f"x = {case.x[different][wrong][0]!r} at scale {scale[wrong][0]!r} gives {found[different][wrong][0]!r}, "
        f"the reference {wanted[different][wrong][0]!r}: {case.grid}"
    )
