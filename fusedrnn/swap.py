"""`swap` and `unswap`: the recurrent layers of a model from torch.nn's to ours and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fusedrnn import modules

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


def swap(model: Model) -> Model:
    """Makes every torch.nn RNN, GRU, LSTM and cell in `model` a fused one, in place.

    Only the class of each instance changes, so parameters (shared and tied ones too), buffers,
    hooks, mode, device, dtype and the optimizer's references to them stay as they are. Subclasses
    of torch.nn's classes are left alone: their own code may rely on what torch.nn's does.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    return _change(model, PAIRS)


def unswap(model: Model) -> Model:
    """Undoes `swap`, in place: every fused layer becomes torch.nn's. Returns `model` itself.

    Raises:
        ValueError: a layer has a regulariser or layer normalisation, which torch.nn does not
            know; nothing is changed.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        regularisers = module.only_ours() if isinstance(module, modules._Fused) else None
        if regularisers:
            raise ValueError(f"torch.nn has no {regularisers}: {module}")
    return _change(model, {fused: plain for plain, fused in PAIRS.items()})


def _change(model: Model, classes: dict[type, type]) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model
