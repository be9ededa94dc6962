"""Runs a program with an ONNX Runtime that takes this processor for one with AVX2 and without AVX-512 and VNNI.

    python benchmarks/older_processor.py python -c 'import onnxruntime; ...'

ONNX Runtime chooses its kernels by what the instruction ``cpuid`` says. In a copy of its library each ``cpuid`` is
replaced by a breakpoint of the same length, and a handler of that signal answers in its place, without the bits of
newer instructions. Everything else runs natively: numbers and times are those of the kernels of an older processor.
It needs ``gcc`` and ``objdump`` (Debian: ``gcc``, ``binutils``) and an x86-64 processor with AVX2 under Linux.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

__all__ = ["MissingToolError", "environment", "main"]

CPUID, BREAKPOINT = b"\x0f\xa2", b"\xcc\x90"
"""The instruction, and ``int3`` with a ``nop``: as long, so that nothing moves."""

HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

static void answer(int number, siginfo_t *information, void *context) {
    (void)number;
    (void)information;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) {
        a = 0;            /* no further parts: AVX-VNNI, AMX, ... */
        b &= ~0xDC230000; /* AVX512F, DQ, IFMA, PF, ER, CD, BW, VL */
        c &= ~0x00005842; /* AVX512VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        d &= ~0x03C0010C; /* AVX512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16, AMX */
    } else if (leaf == 7) {
        a = b = c = d = 0;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGTRAP, &action, 0);
}
"""


class MissingToolError(Exception):
    """What this needs is not there."""


def environment(folder: Path) -> Mapping[str, str]:
    """Make the copy and the handler in an empty folder and return the environment in which programs use them.

    Raises:
        MissingToolError: A tool or ONNX Runtime is not installed, or its library has no ``cpuid``.
    """
    compiler = _tool("gcc")
    found = find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise MissingToolError("onnxruntime is not installed. Fix: pip install onnxruntime")
    package = folder / "packages" / "onnxruntime"
    shutil.copytree(Path(found.origin).parent, package)
    libraries = list(package.glob("capi/onnxruntime_pybind11_state*.so"))
    if not sum(_replace(library) for library in libraries):
        raise MissingToolError(f"there is no cpuid in the library of onnxruntime in {found.origin}")
    handler = folder / "handler.so"
    options = ["-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", str(handler)]
    subprocess.run([compiler, *options], input=HANDLER, text=True, check=True)
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "LD_PRELOAD": str(handler), "PYTHONPATH": os.pathsep.join(paths)}


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingToolError(f"{name} is not installed. Fix: apt install gcc binutils")
    return found


def _replace(library: Path) -> int:
    """Replace each ``cpuid`` of a library, and return how many there were."""
    command = [_tool("objdump"), "-d", "-F", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    begin, shift, places = 0, 0, []
    for line in listing.splitlines():
        if section := re.match(r"([0-9a-f]+) <.*> \(File Offset: 0x([0-9a-f]+)\):", line):
            begin, shift = (int(part, 16) for part in section.groups())
        elif instruction := re.match(r" *([0-9a-f]+):\t0f a2 +\tcpuid", line):
            places.append(int(instruction[1], 16) - begin + shift)
    content = bytearray(library.read_bytes())
    for place in places:
        if content[place : place + 2] != CPUID:
            raise MissingToolError(f"objdump does not show where instructions are in {library}")
        content[place : place + 2] = BREAKPOINT
    library.write_bytes(content)
    return len(places)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that the arguments name and return its exit code."""
    command = list(sys.argv[1:] if argv is None else argv)
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="dopt-older-processor-") as name:
        try:
            return subprocess.run(command, env=environment(Path(name)), check=False).returncode
        except MissingToolError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
