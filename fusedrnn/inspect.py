"""`info` and `explain`: what is installed, and what would run."""

from __future__ import annotations

import copy
import platform
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _C, autocast, checks, cuda, families, support
from fusedrnn._version import __version__
from fusedrnn.layer import LayerBase
from fusedrnn.modules import GRU, LSTM, RNN, LSTMCell
from fusedrnn.quantized import Quantized
from fusedrnn.support import fallback_reason, is_one_hot
from fusedrnn.swap import PAIRS


def info() -> dict[str, str]:
    """Versions, the library of the ops, the instruction set in use, the GPUs it is for, devices."""
    variants = [name if here else f"{name} (not this CPU's)" for name, here in _C.cpu_variants()]
    count = torch.cuda.device_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    reasons = [cuda.missing(torch.device("cuda", i)) for i in range(count)]
    unused = [f"{gpu}: {why}" for gpu, why in zip(gpus, reasons, strict=True) if why]
    runtime, driver = map(cuda.version_text, _C.cuda_versions())
    return {
        "fusedrnn": __version__,
        "library": _C.LIBRARY,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu kernels": f"{_C.cpu_variant()}, compiled: {', '.join(variants)}",
        "cpu threads": str(torch.get_num_threads()),
        "cuda kernels": _C.cuda_archs() or "none in this build",
        "cuda runtime": f"{runtime}, the driver serves {driver}" if cuda.ARCHS else "none",
        "cuda switch": cuda.cuda_kernels(),
        "cuda devices": ", ".join(gpus) or "none",
        "left to torch.nn": "; ".join(unused) or "no device",
    }


def explain(module: nn.Module, *args: object, members: int | None = None, **kwargs: object) -> str:
    """Which kernels `module(*args, **kwargs)` would run, how the work is divided, and why.

    `module` is a recurrent layer, swapped or not: then nothing is run. Or it is a model that has
    some: then a copy of it is run, without gradients and with torch's generators restored, to see
    what its layers are given, and the answer names each layer.

    `members`: of an ensemble, with weights stacked by torch.func.stack_module_state. Then the
    answer is for torch.vmap over them, and the other arguments are those of one member. An argument
    of this name that the model's own forward takes has to be given by position.

    Raises:
        TypeError: `module` is no torch.nn.Module, or has no recurrent layers.
        ValueError: `members` is less than 1.
        ValueError, RuntimeError, ...: what the call itself would raise.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if members is not None and members < 1:
        raise ValueError(f"expected at least one member, got {members}")
    return _explain(module, members, args, kwargs)


def _explain(
    module: nn.Module, members: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _of_model(module, members, args, kwargs)
    try:
        if isinstance(module, nn.RNNBase):
            return _checked(module, members, *args, **kwargs)
        return _of_cell(module, members, *args, **kwargs)
    except Exception:
        if type(module).forward in FORWARDS and "forward" not in vars(module):
            raise
        # These arguments are right for all that is known here.
        return f"{module}: its own forward; explain the layer with what that passes on"


# Whose arguments are known here: that of a subclass may take others.
FORWARDS = {cls.forward for cls in (*PAIRS, *PAIRS.values(), Quantized)}  # type: ignore[attr-defined]


def _of_model(
    model: nn.Module, members: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    model = getattr(model, "_orig_mod", model)  # the module inside torch.compile's wrapper
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:  # a tensor with a graph, such as a state of the last call
        raise RuntimeError(
            f"explain runs a copy of {type(model).__name__}, which cannot be copied ({error}); "
            "explain its layers one by one"
        ) from None
    calls: dict[str, Counter[str]] = {}

    def describe(name: str) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name][_explain(layer, members, args, kwargs)] += 1

        return before

    for name, layer in copied.named_modules():
        layer._compiled_call_impl = None  # of Module.compile: it would call the original
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            calls[name] = Counter()
            layer.register_forward_pre_hook(describe(name), with_kwargs=True)
    if not calls:
        raise TypeError(f"expected recurrent layers, got {type(model).__name__}, which has none")
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(gpus), torch.no_grad():
        copied(*args, **kwargs)
    lines = []
    for name, texts in calls.items():
        for text, count in texts.items():
            often = f" ({count} calls)" if count > 1 else ""
            lines.append(f"{name}{often}: {text}")
        if not texts:
            lines.append(f"{name}: not called")
    return "\n".join(lines)


def _head(module: nn.Module, data: Tensor, members: int | None) -> str:
    head = f"{module} on {tuple(data.shape)} {data.dtype} {data.device.type}"
    return f"{head}:" if members is None else f"{head}, of each of {members} members:"


def _under_vmap(data: Tensor, packed: bool = False) -> str:
    """What becomes of torch.nn's own kernels where members have weights of their own."""
    text = "under torch.vmap they raise an error, because they have no batching rule"
    if packed or support.on_gpu(data):
        return text
    return f"{text}; inside of torch.func.grad they run, step by step or member by member"


def _of_cell(cell: nn.RNNCellBase, members: int | None, input: Tensor, hx: Any = None) -> str:
    """Calls a copy on the meta device first, which raises the error of the call."""
    states = tuple(s.to("meta") for s in hx) if isinstance(hx, tuple) else hx
    states = states.to("meta") if isinstance(states, Tensor) else states
    twin = copy.copy(cell)
    moved: Any = {n: p if p is None else p.to("meta") for n, p in cell._parameters.items()}
    twin._parameters = moved
    type(cell).forward(twin, input.to("meta"), states)
    text = f"{_head(cell, input, members)} torch.nn's own code, one step a call"
    if members is None or not isinstance(cell, nn.LSTMCell) or isinstance(cell, LSTMCell):
        return text
    return f"{text}: see fusedrnn.swap\n  {_under_vmap(input)}"


def _checked(
    module: nn.RNNBase,
    members: int | None,
    input: Any,
    hx: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    return_all: bool = False,
) -> str:
    """The layer's answer, after the checks that its call would make."""
    ours, given = isinstance(module, LayerBase), {"lengths": lengths, "resets": resets}
    twin: Any = module
    if not ours:
        unknown = [name for name, value in given.items() if value is not None]
        unknown += ["return_all"] if return_all else []
        if unknown:
            raise TypeError(
                f"torch.nn's layer takes no {' and no '.join(unknown)}: fusedrnn.swap makes it "
                "fusedrnn's"
            )
        twin = object.__new__(next(c for c in FUSED if isinstance(module, c.__bases__[1])))
        twin.__dict__ = module.__dict__
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(module, Quantized):
        if members is not None:
            module._refuse_transforms()
        if resets is not None or return_all:
            wrong = "resets" if resets is not None else "return_all"
            raise TypeError(f"{module._get_name()} takes no {wrong}: see fusedrnn.dequantize")
        module._check_mode()
        module._check_devices(data, hx)
    one_hot = ours and is_one_hot(data, isinstance(input, PackedSequence))
    x, *_, in_steps = checks.canonical(twin, input, hx, lengths, one_hot)
    checks.refuse_values(x, in_steps, one_hot, module.input_size)
    if resets is not None:
        checks.checked_resets(twin, resets, input, x, one_hot)
    return _of_layer(
        module, members, input, hx, lengths is not None, resets is not None, return_all
    )


def _in_kernels(regularisers: str | None) -> list[str]:
    return [f"{regularisers} in the kernels"] if regularisers else []


FUSED = (RNN, GRU, LSTM)


def _of_layer(
    module: nn.RNNBase,
    members: int | None,
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: bool,
    resets: bool,
    return_all: bool,
) -> str:
    """Which kernels would run, how the work is divided, and why not faster ones."""
    data: Any = input.data if isinstance(input, PackedSequence) else input
    head, packed = _head(module, data, members), isinstance(input, PackedSequence)
    vmapped = [] if members is None else [_under_vmap(data, packed)]
    if not isinstance(module, LayerBase):
        why = "torch.nn's own kernels, because it is not fusedrnn's: see fusedrnn.swap"
        return "\n  ".join([f"{head} {why}", *vmapped])
    reason = fallback_reason(data)
    one_hot, regularisers = is_one_hot(data, packed), module.only_ours()
    if reason:
        if one_hot or regularisers:
            return f"{head} plain PyTorch, because {reason}"
        return "\n  ".join([f"{head} torch.nn's own kernels, because {reason}", *vmapped])
    steps, batch = support.sizes(module, input, one_hot)
    stored: Any = torch.float32 if module.stored else data.dtype
    if one_hot and not module.stored:
        stored = module.weight_ih_l0.dtype
    if not module.stored and autocast.is_on(data) and stored != torch.float64:
        stored = torch.get_autocast_dtype(data.device.type)
    if support.on_gpu(data):
        more = one_hot or lengths or resets or return_all or bool(regularisers)
        more = more or members is not None  # vmap runs the kernels: support.torch_instead
        instead = None if more else support.torch_instead(module, input, hx)
        if instead:
            return f"{head} torch.nn's own kernels, forward and backward, because {instead}"
        words = _cuda_plans(module, stored, steps, batch, members or 1, data.device)
        return "\n  ".join([head, words, *_in_kernels(regularisers)])
    each = members or 1
    plans = {
        backward: _C.cpu_plan(
            mode=module.mode,
            dtype=str(stored).removeprefix("torch."),
            input_size=module.input_size,
            one_hot=one_hot,
            hidden_size=module.hidden_size,
            proj_size=module.proj_size,
            num_layers=module.num_layers,
            bidirectional=module.bidirectional,
            layer_norm=module.layer_norm,
            zoneout=any(module._zoneout_rates()),
            # Drawn in training only, like dropout.
            recurrent_dropout=module.training and module.recurrent_dropout > 0,
            resets=resets,
            return_all=return_all,
            stored=module.stored,
            steps=steps,
            batch=batch * each,
            tokens=(data.shape[0] if packed else steps * batch) * each,
            members=each,
            threads=torch.get_num_threads(),
            backward=backward,
        )
        for backward in ((False,) if module.stored else (False, True))
    }
    lines = [f"fused CPU kernels, forward {plans[False]}"]
    lines += [] if module.stored else [f"backward {plans[True]}"]
    lines += _in_kernels(regularisers)
    if one_hot:
        lines.append("integers as one-hot vectors: rows of the first layer's W_ih^T are gathered")
    return "\n  ".join([head, *lines])


def _cuda_plans(
    module: LayerBase,
    dtype: torch.dtype,
    steps: int,
    batch: int,
    members: int,
    device: torch.device,
) -> str:
    config, spec, struck = module._config(), cuda.spec(device), cuda.struck(device)
    try:
        forward, backward = (
            cuda.plan(config, dtype, steps, batch * members, way, spec, struck, members=members)
            for way in (False, True)
        )
    except ValueError:
        if not struck:
            raise
        return "not in the kernels, which were all refused or found wrong for this call"
    lines = [f"fused CUDA kernels, forward {forward.text}", f"backward {backward.text}"]
    if dtype == torch.float32:
        lines.append(f"products over all steps {cuda.float32_products(spec)}")
    known = cuda.standings(device)
    if cuda.cuda_kernels() == "verified" and not {forward.family, backward.family} <= set(known):
        lines.append("each kind is checked on this device before it runs for the first time")
    names = {f.number: f.name for f in families.cuda_families()}
    lines += [f"not run: {names[i]} ({known[i].state}: {known[i].reason})" for i in struck]
    return "\n  ".join(lines)
