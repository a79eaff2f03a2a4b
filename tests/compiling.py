"""Compiles with ninja what only tests need: below build/, when it is first used or has changed."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def setup_script() -> ModuleType:
    """setup.py, for the compilers that it finds."""
    spec = importlib.util.spec_from_file_location("fusedrnn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(*patterns: str) -> list[str]:
    """Paths that match, relative to ROOT as all of a build is."""
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def rules(flags: str) -> list[str]:
    """`cxx` and `link` of a build.ninja, with the compiler that setup.py finds."""
    cxx = " ".join(setup_script().find_cxx())
    return [
        "rule cxx",
        f"  command = {cxx} {flags} $flags -MD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $in -o $out $flags",
    ]


def build(folder: str, lines: list[str], target: str) -> Path:
    """Makes `target` as the lines of a build.ninja say, in a folder of ROOT."""
    path = ROOT / folder
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / "build.ninja").write_text("\n".join([f"builddir = {folder}", *lines, ""]))
        command = [setup_script().find_ninja(), "-f", f"{folder}/build.ninja", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return ROOT / target
