"""Cells, and how a fused and a torch.nn module of the same weights are made and run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn

# name -> (class name, extra constructor arguments as a function of hidden_size)
CELLS: dict[str, tuple[str, Any]] = {
    "rnn": ("RNN", lambda h: {}),
    "relu": ("RNN", lambda h: {"nonlinearity": "relu"}),
    "gru": ("GRU", lambda h: {}),
    "lstm": ("LSTM", lambda h: {}),
    "lstm-proj": ("LSTM", lambda h: {"proj_size": (h + 1) // 2} if h > 1 else {}),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# torch.nn hands an LSTM's padded float32 input to oneDNN under autocast too, which then fails on a
# processor without the instructions for bfloat16.
AUTOCAST_LSTM = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def make_pair(cell: str, input_size: int, hidden_size: int, seed: int = 0, **kwargs: Any):
    """(torch.nn's module, ours) with the same weights."""
    name, extra = CELLS[cell]
    arguments = {**extra(hidden_size), **kwargs}
    torch.manual_seed(seed)
    plain = getattr(nn, name)(input_size, hidden_size, **arguments)
    fused = getattr(fusedrnn, name)(input_size, hidden_size, **arguments)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def random_state(module: nn.RNNBase, batch: int, seed: int = 1) -> tuple[Tensor, ...]:
    """Random initial states (h_0,) or (h_0, c_0) for `module`."""
    generator = torch.Generator().manual_seed(seed)
    n = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size]
    if module.mode == "LSTM":
        widths.append(module.hidden_size)
    weight = module.weight_ih_l0
    return tuple(torch.randn(n, batch, w, generator=generator).to(weight.dtype) for w in widths)


def run(
    module: nn.Module, x: Any, states: tuple[Tensor, ...] | None, seed: int = 2, **kwargs: Any
) -> dict[str, Tensor]:
    """Outputs, states and every gradient of one forward and backward of `module`.

    The loss is a random linear form of all results, so that every gradient sees random values. All
    of it happens on the module's device, results are on the CPU.
    """
    packed = isinstance(x, nn.utils.rnn.PackedSequence)
    device = module.weight_ih_l0.device
    x = x.to(device)
    states = None if states is None else tuple(s.to(device) for s in states)
    data = (x.data if packed else x).detach().clone().requires_grad_()
    given = x._replace(data=data) if packed else data
    leaves = None if states is None else tuple(s.detach().clone().requires_grad_() for s in states)
    lstm = isinstance(module, nn.LSTM)
    hx = leaves if lstm or leaves is None else leaves[0]
    y, state = module(given, hx, **kwargs)
    results = {"output": y.data if packed else y}
    results |= dict(zip(("h_n", "c_n"), state if lstm else (state,), strict=False))
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for r in results.values():
        form = torch.randn(r.shape, generator=generator, dtype=torch.float64)
        loss = loss + (r.double() * form.to(device)).sum()
    inputs = {"x": data, **dict(zip(("h_0", "c_0"), leaves or (), strict=False))}
    inputs |= dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(inputs.values()))
    results |= {f"grad {name}": g for name, g in zip(inputs, grads, strict=True)}
    return {name: r.detach().cpu() for name, r in results.items()}
