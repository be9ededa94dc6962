"""Finding chromium, and installing it on a machine that has none: ``python get_chromium.py``."""

import os
import shutil
import subprocess
import sys

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def chromium():
    """Return the path of the browser, or ``None``."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def install():
    """Install it by apt-get, for which one must be root; whatever stands in the way is said."""
    if not shutil.which("apt-get"):
        sys.exit("There is no chromium and no apt-get. Fix: install chromium (or google-chrome) so that it is on PATH.")
    if os.geteuid():
        sys.exit("There is no chromium, and only root may install it. Fix: sudo apt-get install chromium")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", "chromium"]):
        done = subprocess.run(["apt-get", *command], env=environment, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(f"apt-get {' '.join(command)} failed. Fix: install chromium by hand.")
    if not chromium():
        sys.exit("apt-get installed chromium, but it is not on PATH. Fix: add its folder to PATH.")


if __name__ == "__main__" and not chromium():
    install()
