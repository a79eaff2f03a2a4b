"""The short way from a module's call to its op.

A step of a small layer takes a few microseconds, less than the checks, casts and masks of a general
call. So a plain call (a tensor, its states, no options) asks only what decides that it is plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import calls, checks, ops, support
from fusedrnn.drop_in import PUBLIC
from fusedrnn.layer import ONLY_OURS, LayerBase

OURS = frozenset(ONLY_OURS)  # attributes that a layer has where they are on


def _call(
    x: Tensor, hx: Any, cx: Any, weights: list[Tensor], stack: tuple, graph: bool, save: bool
) -> tuple[Tensor, Tensor, Any]:
    """y, hn and an LSTM's cn; `stack`: the first fields of Config."""
    if graph:
        constants = (0.0, *stack, *calls.NO_OPTIONS)
        return ops.apply_forward(None, save, constants, None, x, hx, cx, *weights)
    return ops.call_below_autograd(ops.infer, x, hx, cx, weights, *stack)[:3]


def run(layer: LayerBase, input: Any, hx: Any) -> Any:
    """The results of a call with nothing but input and states, which eager mode runs.

    None where this is another call, or one that the op refuses: torch.nn's checks then find the
    words for it.
    """
    if (
        type(input) is not Tensor
        or type(layer).__module__ != PUBLIC  # a subclass may check otherwise
        # The first is the usual case of the second, without its call.
        or not (
            (input.is_cpu and input.dtype in support.KERNEL_DTYPES)
            or support.no_kernel(input) is None
        )
        or (layer.training and layer.dropout)
        or not OURS.isdisjoint(layer.__dict__)
        or torch._C._is_any_autocast_enabled()
    ):
        return None
    lstm = layer.mode == "LSTM"
    h = c = None
    if hx is not None:
        h, c = hx if lstm and type(hx) is tuple and len(hx) == 2 else (hx, None)
        if not isinstance(h, Tensor) or (lstm and not isinstance(c, Tensor)):
            return None
    parameters = layer._parameters
    try:
        weights: list[Any] = [parameters[name] for name in layer._flat_weights_names]
    except KeyError:  # parametrized: looked at twice it could be drawn twice
        return None
    tensors = (*weights, input, h, c)
    if not ops.can_skip_dispatch(tensors):
        return None
    one_hot = not input.is_floating_point()
    sizes = input.shape
    dim = len(sizes) + one_hot
    if (
        dim not in (2, 3)
        or 0 in sizes
        or not (one_hot or sizes[-1] == layer.input_size)
        or (h is not None and h.dim() != dim)
        or (c is not None and c.dim() != dim)
    ):
        return None
    x: Any = input
    if dim == 2:
        x, h, c = (None if t is None else t.unsqueeze(1) for t in (x, h, c))
    elif layer.batch_first:
        x = x.transpose(0, 1)
    if support.on_gpu(input) and not one_hot and support.torch_instead(layer, input, hx):
        return None
    graph = (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and not torch.is_inference_mode_enabled()
    )
    save = graph and not layer.recompute
    try:
        y, hn, cn = _call(x, h, c, weights, layer._stack(), graph, save)
    except RuntimeError as error:
        if "fusedrnn: " not in str(error) and all(w is not None for w in weights):
            raise  # not the op's: a hook's on saved tensors, say
        return None
    if one_hot and hx is None:
        checks.warn_of_features(layer, input, 5)
    if dim == 2:
        y, hn = y.squeeze(1), hn.squeeze(1)
    elif layer.batch_first:
        y = y.transpose(0, 1)
    if not lstm:
        return y, hn
    return y, (hn, cn.squeeze(1) if dim == 2 else cn)
