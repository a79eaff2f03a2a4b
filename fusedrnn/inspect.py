"""`info` and `explain`: what is installed, and what would run."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _C, cuda
from fusedrnn._version import __version__
from fusedrnn.modules import _Fused, fallback_reason, is_one_hot


def info() -> dict[str, str]:
    """Versions, the CPU instruction set in use, the GPUs the binary is for, the devices here."""
    variants = [name if here else f"{name} (not this CPU's)" for name, here in _C.cpu_variants()]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fusedrnn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu kernels": f"{_C.cpu_variant()}, compiled: {', '.join(variants)}",
        "cpu threads": str(torch.get_num_threads()),
        "cuda kernels": _C.cuda_archs() or "none in this build",
        "cuda devices": ", ".join(gpus) or "none",
    }


def explain(module: nn.Module, input: Tensor | PackedSequence) -> str:
    """Which kernels `module(input)` would run, how the work is divided, and why not faster ones.

    Runs nothing. `module` is any torch.nn recurrent layer, swapped or not.

    Raises:
        TypeError: `module` is not a recurrent layer.
    """
    if not isinstance(module, nn.RNNBase):
        raise TypeError(f"expected an RNN, GRU or LSTM, got {type(module).__name__}")
    data: Any = input.data if isinstance(input, PackedSequence) else input
    head = f"{module} on {tuple(data.shape)} {data.dtype} {data.device.type}:"
    if not isinstance(module, _Fused):
        return f"{head} torch.nn's own kernels, because it is not fusedrnn's: see fusedrnn.swap"
    reason = fallback_reason(module, data)
    packed = isinstance(input, PackedSequence)
    one_hot, regularisers = is_one_hot(data, packed), module.only_ours()
    if not reason and regularisers and data.device.type == "cuda":
        reason = f"no CUDA kernel has {regularisers}"
    if reason:
        ours = one_hot or regularisers
        what = "plain PyTorch" if ours else "torch.nn's own kernels"
        return f"{head} {what}, because {reason}"
    if isinstance(input, PackedSequence):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
    elif data.dim() + one_hot == 2:
        steps, batch = data.shape[0], 1
    else:
        batch, steps = data.shape[:2] if module.batch_first else data.shape[:2][::-1]
    if data.device.type == "cuda":
        stored: Any = module.weight_ih_l0.dtype if one_hot else data.dtype
        config, spec = module._config(), cuda.spec(data.device)
        forward, backward = (
            cuda.plan(config, stored, steps, batch, backward, spec) for backward in (False, True)
        )
        return f"{head}\n  fused CUDA kernels, forward {forward}\n  backward {backward}"
    plans = {
        backward: _C.cpu_plan(
            mode=module.mode,
            dtype=str(module.weight_ih_l0.dtype if one_hot else data.dtype).removeprefix("torch."),
            input_size=module.input_size,
            one_hot=one_hot,
            hidden_size=module.hidden_size,
            proj_size=module.proj_size,
            num_layers=module.num_layers,
            bidirectional=module.bidirectional,
            layer_norm=module.layer_norm,
            zoneout=any(module._zoneout_rates()),
            # Drawn in training only, as dropout is.
            recurrent_dropout=module.training and module.recurrent_dropout > 0,
            resets=False,
            return_all=False,
            steps=steps,
            batch=batch,
            tokens=data.shape[0] if packed else steps * batch,
            threads=torch.get_num_threads(),
            backward=backward,
        )
        for backward in (False, True)
    }
    lines = [f"fused CPU kernels, forward {plans[False]}", f"backward {plans[True]}"]
    if regularisers:
        lines.append(f"{regularisers} in the kernels")
    if one_hot:
        lines.append("integers as one-hot vectors: rows of the first layer's W_ih^T are gathered")
    return "\n  ".join([head, *lines])
