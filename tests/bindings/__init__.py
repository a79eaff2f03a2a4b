"""The planner of csrc/plan, and the structures of kernel launches, as classes with named fields.

Compiled with pybind11, for tests and `benchmarks.plans` only: it needs one Python's own interface,
and the package's binary serves all. The first use of a name compiles, which takes a minute.
"""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from types import ModuleType
from typing import Any

from compiling import build, rules, sources

FOLDER = "build/bindings"
FLAGS = "-std=c++20 -O0 -fPIC -fvisibility=hidden -Icsrc -Itests -Wall -Wextra"


def _build_lines(target: str) -> list[str]:
    import pybind11

    system = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    lines = rules(f"{FLAGS} {system}")
    objects = []
    for source in sources("csrc/plan/*.cpp", "tests/bindings/*.cpp"):
        objects.append(f"{FOLDER}/{source}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
    return [*lines, f"build {target}: link {' '.join(objects)}", "  flags = -shared"]


@functools.cache
def _load() -> ModuleType:
    target = f"{FOLDER}/fusedrnn_bindings{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = build(FOLDER, _build_lines(target), target)
    spec = importlib.util.spec_from_file_location("fusedrnn_bindings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_load(), name)
