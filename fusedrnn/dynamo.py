"""Lets torch.compile trace our modules, and not our kernels in Python.

Dynamo refuses every instance of torch.nn.RNN, GRU and LSTM, subclasses too, unless
`torch._dynamo.config.allow_rnn` is set. That switch is global: left on, it would also decide how
the user's torch.nn layers are compiled. So it is on only while dynamo looks at a module of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, cast

from torch import nn
from torch._C._dynamo import eval_frame

from fusedrnn.on_import import when_imported


def allow(cls: type[nn.Module]) -> None:
    """Makes dynamo trace instances of `cls`, whether it is imported already or later."""

    def patch(builder: ModuleType) -> None:
        known = getattr(builder.VariableBuilder, "wrap_module", None)
        if known is None or not hasattr(builder.config, "allow_rnn"):
            return  # a later torch, which needs no such change or says so itself

        def wrap_module(self: Any, value: nn.Module) -> Any:
            if not isinstance(value, cls):
                return known(self, value)
            with builder.config.patch(allow_rnn=True):
                return known(self, value)

        builder.VariableBuilder.wrap_module = wrap_module

    when_imported("torch._dynamo.variables.builder", patch)


def leave(function: Callable[..., Any]) -> None:
    """Makes dynamo leave a function that C++ calls, and what that calls, to Python.

    Behind a break of the graph an op runs in eager mode, but dynamo still looks at every function
    of Python: it would trace the op's kernels, with arguments that it cannot take.
    """
    with contextlib.suppress(AttributeError):  # of a later torch, which may name it otherwise
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(cast(FunctionType, function).__code__, strategy)
