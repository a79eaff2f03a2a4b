"""Correctness of a case; incorrect results are not timed.

The reference is torch.nn in float64 with the same weights and input on the same device. The error
is bounded by a multiple of torch.nn's error in the measured dtype plus half a rounding; float64
itself by 1e-12 of the largest value.

Where TF32 is permitted, not every implementation uses it everywhere. torch.nn's error is then taken
to be at least the change that rounding weights and data to TF32 causes.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import Setting, Unit

FLOAT64 = 1e-12


@dataclass(frozen=True)
class Expected:
    """The results in float64, and torch.nn's error in the dtype (see ``error``)."""

    values: dict[str, Tensor]
    units: dict[str, float]


def expect(
    case: Case, dtype: torch.dtype, device: torch.device, setting: Setting = nullcontext
) -> Expected:
    """Trains ``case`` by torch.nn for one step, in float64 and in ``dtype``."""
    module, data = case.module(dtype, device), case.data(dtype, device)
    exact = copy.deepcopy(module).double()
    values = Unit(exact, data.double(), "training", case.input_grad).results()
    # Without autograd torch.nn uses other products, sometimes with twice the error.
    others = [
        Unit(module, data, mode, case.input_grad, setting).results()
        for mode in ("training", "inference")
    ]
    if permits_tf32(dtype, device, setting):
        with torch.no_grad():
            for parameter in exact.parameters():
                parameter.copy_(to_tf32(parameter))
        rounded = data.double().map(to_tf32)
        others.append(Unit(exact, rounded, "training", case.input_grad).results())
    units = {}
    for name, value in values.items():
        if dtype == torch.float64:
            units[name] = FLOAT64 / 2 * value.abs().max().item()  # twice that is the bound
        else:
            rounding = torch.finfo(dtype).eps / 2 * _rms(value)
            off = max(_rms(other[name].double() - value) for other in others if name in other)
            units[name] = off + rounding / 2
    return Expected(values, units)


def permits_tf32(dtype: torch.dtype, device: torch.device, setting: Setting) -> bool:
    with setting():
        return dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32


def to_tf32(t: Tensor) -> Tensor:
    """Rounds to TF32's 10 of a float32's 23 bits."""
    bits = t.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)


def error(results: dict[str, Tensor], expected: Expected) -> float:
    """The largest error, as a multiple of torch.nn's in the same dtype.

    For float64, as a multiple of half its bound.
    """
    ratios = [
        _rms(results[name].double() - value) / max(expected.units[name], 1e-300)
        for name, value in expected.values.items()
        if name in results
    ]
    return max(ratios, key=lambda r: (r != r, r))  # NaN counts as the largest


def problem(
    results: dict[str, Tensor],
    expected: Expected,
    mode: str,
    factor: float = 2.0,
    relative: float = 0.0,
) -> str | None:
    """The first incorrect result, None if all are correct.

    An error may be `factor` times torch.nn's or, if that is more, `relative` of the values.
    """
    for name, value in expected.values.items():
        if name.startswith("grad") and mode != "training":
            continue
        found = results.get(name)
        if found is None:
            return f"no {name}"
        if found.shape != value.shape:
            return f"{name} has shape {tuple(found.shape)}, not {tuple(value.shape)}"
        off = _rms(found.double() - value)
        bound = max(factor * expected.units[name], relative * _rms(value))
        if not off <= bound:  # unlike >, fails for NaN
            return f"error of {name} is {off:.1e}, not within {bound:.1e}"
    return None


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()
