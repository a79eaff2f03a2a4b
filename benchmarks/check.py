"""Whether a case is computed right; what is wrong gets no time.

The reference is torch.nn on the CPU in float64 with the same weights and input. The error against
it may be at most twice that of torch.nn in the dtype that is measured, and a floor of half a
rounding. float64 itself is held to 1e-12 of the largest value.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import Unit

FACTOR = 2.0
FLOAT64 = 1e-12


@dataclass(frozen=True)
class Expected:
    """What a case gives in float64, and how far off each result may be (root mean square)."""

    values: dict[str, Tensor]
    bounds: dict[str, float]


def expect(case: Case, training: bool, dtype: torch.dtype, device: torch.device) -> Expected:
    """Runs ``case`` through torch.nn, in float64 and in ``dtype``."""
    module, data = case.module(dtype), case.data(dtype, device)
    exact = copy.deepcopy(module).double()
    values = Unit(exact, data.double(), training, case.input_grad).results()
    theirs = Unit(module.to(device), data, training, case.input_grad).results()
    bounds = {}
    for name, value in values.items():
        if dtype == torch.float64:
            bounds[name] = FLOAT64 * value.abs().max().item()
        else:
            rounding = torch.finfo(dtype).eps / 2 * _rms(value)
            bounds[name] = FACTOR * _rms(_error(theirs[name], value)) + rounding
    return Expected(values, bounds)


def problem(results: dict[str, Tensor], expected: Expected) -> str | None:
    """What is wrong with ``results``, None if nothing is."""
    for name, value in expected.values.items():
        found = results.get(name)
        if found is None:
            return f"no {name}"
        if found.shape != value.shape:
            return f"{name} has shape {tuple(found.shape)}, not {tuple(value.shape)}"
        error, bound = _rms(_error(found, value)), expected.bounds[name]
        if not error <= bound:  # so, and not with >, NaN is wrong
            return f"error of {name} is {error:.1e}, not within {bound:.1e}"
    return None


def _error(found: Tensor, exact: Tensor) -> Tensor:
    return found.to("cpu", torch.float64) - exact


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()
