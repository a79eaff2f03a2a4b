"""`swap` and `unswap`: the recurrent layers of a model from torch.nn's to ours and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fusedrnn import modules, support
from fusedrnn.layer import LayerBase

PAIRS: dict[type, type] = {
    getattr(nn, cls.__name__): cls
    for cls in (
        modules.RNN,
        modules.GRU,
        modules.LSTM,
        modules.RNNCell,
        modules.GRUCell,
        modules.LSTMCell,
    )
}

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Layer:
    """What became of one recurrent layer."""

    name: str
    """As in `model.named_modules()`: "" where the model itself is the layer."""
    before: str
    after: str
    """The class, with its package: "torch.nn.LSTM", "fusedrnn.LSTM"."""
    reason: str
    """Why it was left; of a changed one what keeps the kernels from it, else empty."""

    @property
    def changed(self) -> bool:
        return self.before != self.after

    def __str__(self) -> str:
        what = f"{self.before} -> {self.after}" if self.changed else f"left {self.before}"
        return f"{self.name or '(the model itself)'}: {what}" + (self.reason and f": {self.reason}")


class Report(Generic[Model]):
    """What `swap` or `unswap` did: `layers`, `changed` and `left` of them, and the `model`.

    Printed, it has a line for each layer. It is not the model, and says so where used as one.
    """

    def __init__(self, function: str, model: Model, layers: tuple[Layer, ...]) -> None:
        self._function = function
        self.model = model
        self.layers = layers

    @property
    def changed(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.changed)

    @property
    def left(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if not layer.changed)

    def __repr__(self) -> str:
        of = f"fusedrnn.{self._function} of {type(self.model).__name__}"
        if not self.layers:
            return f"{of}: it has no recurrent layers of torch.nn"
        counts = f"{len(self.changed)} changed, {len(self.left)} left"
        return "\n  ".join([f"{of}: {counts}", *map(str, self.layers)])

    def _misused(self) -> str:
        call = f"fusedrnn.{self._function}(model)"
        return (
            f"{call} changes the model in place and returns a report of it: write {call} alone, or "
            f"model = {call}.model"
        )

    if not TYPE_CHECKING:  # which refuse these uses, and would take them as they stand here

        def __call__(self, *args, **kwargs):
            raise TypeError(self._misused())

        def __getitem__(self, index):
            raise TypeError(self._misused())

        def __reduce_ex__(self, protocol):  # saved or copied in the model's place
            raise TypeError(self._misused())

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            raise AttributeError(f"a report has no {name!r}. {self._misused()}")


def swap(model: Model) -> Report[Model]:
    """Makes every torch.nn RNN, GRU, LSTM and cell in `model` a fused one, in place.

    Only the class of each instance changes, so parameters (shared and tied ones too), buffers,
    hooks, mode, device, dtype and the optimizer's references to them stay as they are. Subclasses
    of torch.nn's classes are left alone: their own code may rely on what torch.nn's does.

    Returns:
        A report: each recurrent layer's name, and whether it was swapped or left, and why.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    return _change("swap", model, PAIRS, _why_not_swapped)


def unswap(model: Model) -> Report[Model]:
    """Undoes `swap`, in place: every fused layer becomes torch.nn's. Returns a report, as `swap`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: a layer has a regulariser or layer normalisation, which torch.nn does not
            know; nothing is changed.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        regularisers = module.only_ours() if isinstance(module, LayerBase) else None
        if regularisers:
            raise ValueError(f"torch.nn has no {regularisers}: {module}")
    back = {fused: plain for plain, fused in PAIRS.items()}
    return _change("unswap", model, back, _why_not_unswapped)


def _change(
    function: str,
    model: Model,
    classes: dict[type, type],
    why_not: Callable[[nn.Module], str | None],
) -> Report[Model]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    layers = []
    for name, module in model.named_modules():
        before = _class_of(module)
        reason = own_forward(module, function) if type(module) in classes else why_not(module)
        if reason == "":
            module.__class__ = classes[type(module)]
            layers.append(Layer(name, before, _class_of(module), _runs_elsewhere(module)))
        elif reason is not None:
            layers.append(Layer(name, before, before, reason))
    return Report(function, model, tuple(layers))


def _class_of(module: nn.Module) -> str:
    cls = type(module)
    if cls in PAIRS:
        return f"torch.nn.{cls.__name__}"
    return f"fusedrnn.{cls.__name__}" if cls in PAIRS.values() else cls.__name__


def own_forward(layer: nn.Module, function: str) -> str:
    """Why `function` cannot change the class of a layer that some tool gave a forward; else empty.

    Such a forward calls the one that it found, which is that of the class of then.
    """
    if "forward" not in vars(layer):
        return ""
    return f"its forward was replaced, and the new one may call the old: {function} before that"


def _runs_elsewhere(module: nn.Module) -> str:
    """What leaves the calls of a fused layer to torch.nn's code, as its weights are now."""
    weight = next(module.parameters(), None) if isinstance(module, LayerBase) else None
    if weight is None or weight.is_meta:
        return ""
    reason = support.no_kernel(weight)
    if reason:
        return f"torch.nn's code runs, because {reason}"
    if support.on_gpu(weight) and (weight.dtype == torch.float64 or module.proj_size):
        what = "projections" if module.proj_size else "float64"
        return f"torch.nn's code runs where it can: on a GPU only stepwise kernels take {what}"
    return ""


def _why_not_swapped(module: nn.Module) -> str | None:
    """None of what is no recurrent layer."""
    name, where = type(module).__name__, type(module).__module__
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        if name in (cls.__name__ for cls in PAIRS):
            return "compiled by TorchScript: swap before torch.jit does"
        return None
    if where.startswith("torch.ao.nn.quantized") and name in ("LSTM", "GRU"):
        return "quantized: its weights are integers"
    if isinstance(module, LayerBase) and module.stored:
        return "quantized: fusedrnn.dequantize undoes that"
    if type(module) in PAIRS.values():
        return "fusedrnn's already"
    for plain, fused in PAIRS.items():
        if not isinstance(module, plain):
            continue
        if parametrize.is_parametrized(module):
            return "parametrized, which gave it a class of its own: swap before that"
        if isinstance(module, fused):
            return "a subclass of fusedrnn's"
        return (
            f"a subclass of torch.nn.{plain.__name__}, whose own code may rely on torch.nn's: let "
            f"it derive from fusedrnn.{plain.__name__}"
        )
    return None


def _why_not_unswapped(module: nn.Module) -> str | None:
    """None of what is no recurrent layer."""
    if isinstance(module, LayerBase) and module.stored:
        return "quantized: fusedrnn.dequantize first"
    for plain, fused in PAIRS.items():
        if isinstance(module, fused):
            return f"a subclass of fusedrnn.{fused.__name__}, whose own code may rely on it"
        if isinstance(module, plain):
            return "not fusedrnn's"
    return None
