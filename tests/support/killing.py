"""A program that runs a command again and again, kills it at moments all over its way, and starts it anew each time.

``python killing.py MODULES MOMENTS ARGUMENT...``: the arguments are those of ``dopt``, with ``OUT`` for the output
folder. Moments are those at which the command is about to open, make or rename something in that folder; about MOMENTS
of them are tried. Modules, such as a framework's, are imported once, and each run is a fork of that process. What is
printed is JSON: how many such moments an uninterrupted run has, and for each that was tried how the killed process
ended, the exit status of the next run and which files differ in the end.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def run(arguments, folder, fatal=None):
    """Run the command in a process of its own; return its wait status and how many moments it had."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        seen = 0

        def hook(event, given):
            nonlocal seen
            if event in EVENTS and given and str(folder) in str(given[0]):
                seen += 1
                if seen == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(hook)
            from dopt_api.cli.group import dopt

            with contextlib.redirect_stdout(io.StringIO()):
                dopt([str(folder) if one == "OUT" else one for one in arguments], standalone_mode=False)
            status = 0
        finally:
            os.write(write, str(seen).encode())
            os._exit(status)
    os.close(write)
    _, status = os.waitpid(child, 0)
    text = os.read(read, 99)
    os.close(read)
    return status, int(text or 0)


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def main(modules, moments, *arguments):
    for module in modules.split(","):
        import_module(module)
    here = Path.cwd()
    status, count = run(arguments, here / "whole")
    assert status == 0, status
    wanted = digests(here / "whole")
    step = max(count // int(moments), 1)
    tried = list(range(1, count + 1, step))
    found = []
    for fatal in tried:
        folder = here / f"killed_{fatal}"
        killed, _ = run(arguments, folder, fatal)
        again, _ = run(arguments, folder)
        found.append([fatal, os.WTERMSIG(killed), again, compared(wanted, digests(folder))])
    folder = here / "killed_often"
    for fatal in reversed(tried):
        run(arguments, folder, fatal)
    found.append(["often", signal.SIGKILL, run(arguments, folder)[0], compared(wanted, digests(folder))])
    sys.stdout.write(json.dumps({"moments": count, "files": sorted(wanted), "found": found}))


def compared(wanted, files):
    return sorted(name for name in wanted.keys() | files.keys() if wanted.get(name) != files.get(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
