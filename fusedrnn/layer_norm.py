"""The parameters that layer normalisation adds to an LSTM or GRU; reference.py has its formula."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import Parameter


def count(mode: str) -> int:
    """The number of these parameters of a layer and direction, which come last."""
    return 4 if mode == "LSTM" else 2


def add_parameters(module: nn.RNNBase) -> None:
    """Adds gain_ih and gain_hh, an LSTM's gain_c and shift_c too, for each layer and direction."""
    like = module.get_parameter("weight_ih_l0").detach()
    for names in module._all_weights:
        suffix = names[0].removeprefix("weight_ih")
        rows = module.get_parameter(names[0]).size(0)
        sizes = {"gain_ih": rows, "gain_hh": rows}
        if module.mode == "LSTM":
            sizes |= {"gain_c": module.hidden_size, "shift_c": module.hidden_size}
        for name, size in sizes.items():
            value = like.new_zeros(size) if name == "shift_c" else like.new_ones(size)
            module.register_parameter(name + suffix, Parameter(value))
            names.append(name + suffix)
    module._flat_weights_names = [name for names in module._all_weights for name in names]
    module._init_flat_weights()


@torch.no_grad()
def reset_parameters(module: nn.RNNBase) -> None:
    """Draws torch.nn's numbers for its parameters; gains are 1 and shifts 0."""
    bound = 1 / math.sqrt(module.hidden_size)
    for name, parameter in module.named_parameters():
        if "gain_" in name:
            parameter.fill_(1)
        elif "shift_" in name:
            parameter.zero_()
        else:
            parameter.uniform_(-bound, bound)
