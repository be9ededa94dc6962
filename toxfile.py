"""In continuous integration an environment goes as soon as its row is done.

The whole matrix holds several gigabytes of frameworks: so a small disk needs room for one row at a time.
"""

from __future__ import annotations

import os
import shutil

from tox.plugin import impl
from tox.tox_env.api import ToxEnv


@impl
def tox_env_teardown(tox_env: ToxEnv) -> None:
    """Remove the environment where ``CI`` is set; a developer's own stays for the next run."""
    if os.environ.get("CI"):
        shutil.rmtree(tox_env.env_dir, ignore_errors=True)
