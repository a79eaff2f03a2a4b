"""Lets torch.compile trace our modules, without a change for other modules.

Dynamo refuses every instance of torch.nn.RNN, GRU and LSTM, subclasses too, unless
`torch._dynamo.config.allow_rnn` is set. That switch is global: left on, it would also decide how
the user's torch.nn layers are compiled. So it is on only while dynamo looks at a module of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

BUILDER = "torch._dynamo.variables.builder"


def _allow(builder: ModuleType, cls: type[nn.Module]) -> None:
    known = getattr(builder.VariableBuilder, "wrap_module", None)
    if known is None or not hasattr(builder.config, "allow_rnn"):
        return  # a later torch, which needs no such change or says so itself

    def wrap_module(self: Any, value: nn.Module) -> Any:
        if not isinstance(value, cls):
            return known(self, value)
        with builder.config.patch(allow_rnn=True):
            return known(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


class _WhenImported(MetaPathFinder):
    """Calls `_allow` when dynamo is imported; its import would double the time of ours."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == BUILDER else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _allow(module, self.cls)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def allow(cls: type[nn.Module]) -> None:
    """Makes dynamo trace instances of `cls`, whether it is imported already or later."""
    if BUILDER in sys.modules:
        _allow(sys.modules[BUILDER], cls)
    else:
        sys.meta_path.insert(0, _WhenImported(cls))
