"""`quantize` and `dequantize`: the recurrent layers of a model with weights in fewer bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusedrnn import quantized, swap
from fusedrnn.layer import LayerBase
from fusedrnn.swap import Layer, Model, Report


def quantize(model: Model, weights: str = "int8") -> Report[Model]:
    """Stores the weights of every RNN, GRU and LSTM in `model` in fewer bytes, in place.

    For inference on a CPU: input, output, states and biases are float32. The weights are rounded to
    8 bits with a scale for each row, or to bfloat16, and packed once, here. Layers of torch.nn and
    of fusedrnn become `fusedrnn.quantized.QuantizedLSTM` and the like; cells and all else in the
    model stay as they are. docs/quantization.md has accuracy and speed.

    Args:
        model: a model in eval mode, or a layer.
        weights: "int8" or "bfloat16".

    Returns:
        A report, as `swap`: each recurrent layer's name, and whether it was quantized or left, and
        why.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `weights` is another word; a weight is infinite or NaN.
        RuntimeError: a layer to be quantized is in training mode or not on the CPU. Nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if weights not in quantized.KINDS:
        raise ValueError(f'expected weights="int8" or weights="bfloat16", got {weights!r}')
    found = [(name, module, _why_not(module, weights)) for name, module in model.named_modules()]
    chosen = [(name, module) for name, module, reason in found if reason == ""]
    for name, module in chosen:
        _check(name or module._get_name(), module)
    layers = []
    for name, module, reason in found:
        if reason is None:
            continue
        before = after = swap._class_of(module)
        if not reason:
            quantized.to_quantized(module, weights)
            after = _class_of(module)
        layers.append(Layer(name, before, after, reason))
    return Report("quantize", model, tuple(layers))


def dequantize(model: Model) -> Report[Model]:
    """Undoes `quantize`, in place: the layers are fusedrnn's, with the weights as rounded.

    Their weights are new float32 parameters. Layers that were torch.nn's become fusedrnn's, which
    `unswap` makes torch.nn's.

    Returns:
        A report, as `swap`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, quantized.Quantized):
            before = _class_of(module)
            quantized.to_float(module)
            layers.append(Layer(name, before, swap._class_of(module), ""))
    return Report("dequantize", model, tuple(layers))


def _class_of(module: nn.Module) -> str:
    return f"fusedrnn.quantized.{type(module).__name__}"


def _check(name: str, module: Any) -> None:
    if module.training:
        raise RuntimeError(
            f"{name} is in training mode, and quantized weights cannot be trained: model.eval() "
            "before fusedrnn.quantize"
        )
    for parameter, value in module.named_parameters():
        if value.device.type != "cpu":
            raise RuntimeError(
                f"{name}.{parameter} is on {value.device}, and quantized layers run on the CPU: "
                "model.cpu() before fusedrnn.quantize"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name}.{parameter} has values that are infinite or NaN")


def _why_not(module: nn.Module, weights: str) -> str | None:
    """Empty for a layer that can be quantized, None for what is no recurrent layer."""
    if isinstance(module, quantized.Quantized):
        if module.stored == weights:
            return "quantized already"
        return f"its weights are in {module.stored}: fusedrnn.dequantize it first"
    if isinstance(module, torch.jit.ScriptModule):
        return swap._why_not_swapped(module)
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        if type(module).__name__ in ("LSTM", "GRU"):
            return "quantized by torch: quantize the float model in its place"
        return None
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if type(module) not in swap.PAIRS and type(module) not in swap.PAIRS.values():
        return swap._why_not_swapped(module)
    if isinstance(module, nn.RNNCellBase):
        return "a cell: only layers are quantized"
    replaced = swap.own_forward(module, "quantize")
    if replaced:
        return replaced
    for option in ("layer_norm", "zoneout") if isinstance(module, LayerBase) else ():
        if getattr(module, option):
            return f"it has {option}, which quantized layers lack"
    computed = [n for n in module._flat_weights_names if n not in module._parameters]
    if computed:  # before each call, so what is there now may be of other parameters
        return f"its {computed[0]} is no parameter (weight_norm, pruning): remove that before"
    dtype = next(module.parameters()).dtype
    if dtype != torch.float32:
        return f"its weights are {dtype}: model.float() before"
    return ""
