"""Checks the arguments of a call as torch.nn does, and converts them to the form of the ops."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.layer import LayerBase

# What a subclass may have another of. For an LSTM torch.nn has its own.
_TORCH_CHECKS = (nn.RNNBase.check_forward_args, nn.LSTM.check_forward_args)


def canonical(
    module: LayerBase, input: Any, hx: Any, lengths: Any, one_hot: bool
) -> tuple[Any, ...]:
    """Checks as torch.nn does, in its order; returns x time first, hx, cx, unsort, lengths."""
    lstm = module.mode == "LSTM"
    states: tuple[Any, ...] = (hx,)
    if lstm:
        states = (None, None) if hx is None else (hx[0], hx[1])
    unsort = None
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError(
                f"{type(module).__name__}: a PackedSequence has lengths of its own, pass no others"
            )
        x, batch_sizes = input.data, input.batch_sizes
        if _functorch.is_batchedtensor(batch_sizes):
            raise ValueError(
                f"{type(module).__name__}: vmap cannot run over PackedSequences, whose batch_sizes "
                "differ: pass padded input and lengths="
            )
        if input.sorted_indices is not None and hx is not None:
            states = tuple(s.index_select(1, input.sorted_indices) for s in states)
        unsort = input.unsorted_indices
        if not one_hot:
            module.check_input(x, batch_sizes)
        if torch.compiler.is_compiling():
            # A value, on which there can be no guard: the op compares it with the states.
            batch = states[0].size(1) if hx is not None else 0
        else:
            batch = int(batch_sizes[0])
    else:
        x, batch_sizes = input, None
        dim = x.dim() + one_hot  # that of the one-hot vectors
        if dim not in (2, 3):
            raise ValueError(module._dim_error.format(module._get_name(), x.dim()))
        batched = dim == 3
        if hx is not None:
            dims = [s.dim() for s in states]
            if dims != [dim] * len(dims):
                kind = "batched" if batched else "unbatched"
                wrong = ", ".join(f"{d}-D" for d in dims)
                if lstm:
                    raise RuntimeError(
                        f"For {kind} {dim}-D input, hx and cx should "
                        f"also be {dim}-D but got ({wrong}) tensors"
                    )
                raise RuntimeError(
                    f"For {kind} {dim}-D input, hx should also be {dim}-D but got {wrong} tensor"
                )
            if not batched:
                states = tuple(s.unsqueeze(1) for s in states)
        if not batched:
            x = x.unsqueeze(1)
        elif module.batch_first:
            x = x.transpose(0, 1)
        if not one_hot:
            module.check_input(x, None)
        batch = x.size(1)
    if type(module).check_forward_args not in _TORCH_CHECKS:
        _ask_subclass(module, x, states, batch, batch_sizes)
    if hx is not None:
        weight = module._flat_weights[0]
        dtype = weight.dtype if one_hot and weight is not None else x.dtype
        rows, width = module.num_layers * (2 if module.bidirectional else 1), module.hidden_size
        _check_state(module, 0, states[0], (rows, batch, module.proj_size or width), dtype)
        if lstm:
            _check_state(module, 1, states[1], (rows, batch, width), dtype)
            if len(hx) != 2:
                raise RuntimeError("lstm expects two hidden states")
    if batch_sizes is None and x.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        lengths = checked_lengths(module, lengths, batch, x.device)
    return (x, *states, *[None] * (2 - len(states)), unsort, lengths)


def _ask_subclass(
    module: LayerBase, x: Tensor, states: tuple[Any, ...], batch: int, batch_sizes: Any
) -> None:
    """Calls the check that a subclass overrides, with what torch.nn calls it."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    widths = (module.proj_size or module.hidden_size, module.hidden_size)
    dtype = x.dtype if x.is_floating_point() else module._weights()[0].dtype
    hidden: Any = tuple(
        torch.zeros(rows, batch, width, dtype=dtype, device=x.device) if state is None else state
        for state, width in zip(states, widths, strict=False)
    )
    input = x.transpose(0, 1) if module.batch_first and batch_sizes is None else x
    module.check_forward_args(input, hidden if len(hidden) == 2 else hidden[0], batch_sizes)


def _check_state(
    module: LayerBase, i: int, state: Tensor, expected: tuple[int, int, int], dtype: torch.dtype
) -> None:
    if state.size() != expected:
        named = [f"Expected hidden[{i}] size {{}}, got {{}}"] if module.mode == "LSTM" else []
        module.check_hidden_size(state, expected, *named)
    if state.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(
            f"RNN hidden state dtype ({state.dtype}) does not match input dtype ({dtype}). "
            f"Convert it: hx.to({dtype})"
        )


def refuse_devices(x: Tensor, states: tuple[Any, ...], weights: list[Tensor]) -> None:
    """Raises torch.nn's error where a state or a weight is not on the device of the input."""
    device = x.device
    for kind, tensors in (("hidden", states), ("parameter", weights)):
        for t in tensors:
            if t is not None and t.device != device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{device} and {kind} tensor at {t.device}"
                ) from None


def checked_resets(module: LayerBase, resets: Any, input: Any, x: Tensor, one_hot: bool) -> Tensor:
    """Bools, time first, or as the data of packed input."""
    name = type(module).__name__
    if isinstance(resets, PackedSequence) and isinstance(input, PackedSequence):
        resets = resets.data
    resets = _as_tensor(name, "resets", resets)
    data = input.data if isinstance(input, PackedSequence) else input
    expected = data.shape if one_hot else data.shape[:-1]
    if resets.shape == (*expected, 1):  # as TorchRL keeps them
        resets = resets.squeeze(-1)
    if resets.shape != expected:
        raise RuntimeError(
            f"{name}: Expected resets of shape {list(expected)}, got {list(resets.shape)}"
        )
    if resets.dtype != torch.bool:
        # Looking at values on another device would wait for it.
        if resets.is_cpu and not _traced(resets) and not ((resets == 0) | (resets == 1)).all():
            raise ValueError(
                f"{name}: resets should be 0 or 1: where any other value begins a sequence too, "
                "write resets != 0"
            )
        resets = resets != 0
    if not isinstance(input, PackedSequence):
        if resets.dim() == 1:
            resets = resets.unsqueeze(1)
        elif module.batch_first:
            resets = resets.transpose(0, 1)
    return resets.to(x.device)


def checked_lengths(module: LayerBase, lengths: Any, batch: int, device: torch.device) -> Tensor:
    name = type(module).__name__
    lengths = _as_tensor(name, "lengths", lengths)
    kind = lengths.dtype
    if kind == torch.bool:
        raise TypeError(f"{name}: lengths should be integers, got torch.bool: write mask.sum(-1)")
    if kind.is_floating_point or kind.is_complex:
        raise TypeError(
            f"{name}: lengths should be integers, got {kind}: write lengths.long(), or "
            "(lengths * T).round().long() where they are fractions of the T steps"
        )
    if lengths.shape == (batch, 1):
        lengths = lengths.squeeze(-1)
    if lengths.shape != (batch,):
        raise RuntimeError(
            f"{name}: Expected lengths of shape ({batch},), got {list(lengths.shape)}"
        )
    # A copy to the CPU has to be complete before it is read.
    return lengths.to(device, non_blocking=device.type == "cuda")


def refuse_values(x: Tensor, lengths: Tensor | None, one_hot: bool, input_size: int) -> None:
    """Raises the op's errors of values, which it finds only while it runs; `x`: time first."""
    if not x.is_cpu or _traced(x):
        return
    if lengths is not None:
        steps = x.size(0)
        wrong = lengths[(lengths < 0) | (lengths > steps)]
        if len(wrong):
            raise RuntimeError(f"fusedrnn: expected lengths in [0, {steps}], got {int(wrong[0])}")
    if one_hot:
        outside = (x < 0) | (x >= input_size)
        if lengths is not None:
            outside &= torch.arange(x.size(0)).unsqueeze(1) < lengths
        if outside.any():
            raise IndexError(
                f"fusedrnn: index {int(x[outside][0])} is out of range for input_size "
                f"{input_size}: integers stand for one-hot vectors, features need input.float()"
            )


def _as_tensor(name: str, argument: str, given: Any) -> Tensor:
    """Converts an array or a list of numbers; a tensor is returned as it is."""
    if isinstance(given, Tensor):
        return given
    plain = isinstance(given, (list, tuple)) and not isinstance(given, PackedSequence)
    if plain or hasattr(given, "__array__"):
        try:
            # torch takes an empty list for floats, and numbers to the default device.
            dtype = torch.int64 if plain and not given else None
            return torch.as_tensor(given, dtype=dtype, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"a {type(given).__name__} of which torch makes no tensor ({error})"
            raise TypeError(f"{name}: {argument} should be a Tensor, got {what}") from None
    raise TypeError(
        f"{name}: {argument} should be a Tensor, an array or a list, got: {type(given).__name__}"
    )


def _traced(tensor: Tensor) -> bool:
    """Whether the values of `tensor` cannot be read here."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def warn_of_features(module: LayerBase, input: Tensor, caller: int) -> None:
    """Warns of integers whose last dimension is input_size, features that torch.nn refuses.

    `caller` is how many frames above this one the module is called.
    """
    if torch.compiler.is_compiling() or list(input.shape[-1:]) != [module.input_size]:
        return
    shape, name = list(input.shape), type(module).__name__
    dims = "(T,)" if len(shape) == 1 else "(B, T)" if module.batch_first else "(T, B)"
    warnings.warn(
        f"{name}: integers of shape {shape} are taken for {dims} of tokens that stand for one-hot "
        f"vectors, and the last dimension is also input_size: if these are features, write "
        "input.float(); if they are tokens, pass hx or lengths, which says so",
        stacklevel=caller + 1,
    )
