"""What the single-step cells share: torch.nn's operators, and plain PyTorch under torch.func."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import _VF, Tensor
from torch.nn.functional import linear

from fusedrnn.drop_in import DropIn
from fusedrnn.reference import STEPS

# By the name of the class, for RNNCell by its nonlinearity.
_OPERATORS: dict[str, Any] = {
    "tanh": _VF.rnn_tanh_cell,
    "relu": _VF.rnn_relu_cell,
    "GRUCell": _VF.gru_cell,
    "LSTMCell": _VF.lstm_cell,
}


def _is_batch(state: Any) -> bool:
    return isinstance(state, Tensor) and state.dim() == 2


class SingleStep(DropIn):
    """A cell: torch.nn's operators under our name.

    torch.nn's operators write gates in place, which torch.func.vmap does not take. Under torch.func
    the step is made of operators that it takes.
    """

    if TYPE_CHECKING:  # torch.nn.RNNCellBase's
        hidden_size: int
        nonlinearity: str
        weight_ih: Tensor
        weight_hh: Tensor
        bias_ih: Any
        bias_hh: Any

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if torch._C._are_functorch_transforms_active():
            return self._transformed(input, hx)
        if type(input) is Tensor:
            found = self._plain(input, hx)
            if found is not None:
                return found
        elif self._is_leaf(input):
            return self._record(input, hx)
        return super().forward(input, hx)

    def _plain(self, input: Tensor, hx: Any) -> Any:
        """torch.nn's operator for a batch in eager mode; None of other calls.

        What torch.nn's forward does, sooner: it finds weights by Module.__getattr__.
        """
        name = type(self).__name__
        operator = _OPERATORS.get(self.nonlinearity if name == "RNNCell" else name)
        if operator is None or input.dim() != 2 or torch.compiler.is_compiling():
            return None
        found = self._parameters
        try:
            weights = found["weight_ih"], found["weight_hh"], found["bias_ih"], found["bias_hh"]
        except KeyError:  # parametrized
            return None
        lstm = name == "LSTMCell"
        if hx is None:
            zeros = torch.zeros(
                input.size(0), self.hidden_size, dtype=input.dtype, device=input.device
            )
            hx = (zeros, zeros) if lstm else zeros
        elif not (_is_batch(hx[0]) and _is_batch(hx[1]) if lstm else _is_batch(hx)):
            return None
        return operator(input, hx, *weights)

    def _transformed(self, input: Tensor, hx: Any) -> Any:
        name, lstm = self._get_name(), self._get_name() == "LSTMCell"
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        states: tuple[Any, ...] = hx if lstm and hx is not None else (hx, None)
        for i, state in enumerate(states):
            if state is not None and state.dim() not in (1, 2):
                what = f"hx[{i}]" if lstm else "hidden"
                raise ValueError(
                    f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead"
                )
        w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        h, c = states
        if h is None:
            h = input.new_zeros((*input.shape[:-1], self.hidden_size))
            c = h if lstm else None
        elif h.shape[:-1] != input.shape[:-1]:
            raise RuntimeError(
                f"{name}: Expected hidden of the input's batch size, got {list(h.shape)} with "
                f"input of {list(input.shape)}"
            )
        step = STEPS[self._mode(name)]
        h, c = step(linear(input, w_ih, b_ih), linear(h, w_hh, b_hh), h, c)
        return (h, c) if lstm else h

    def _mode(self, name: str) -> str:
        mode = name.removesuffix("Cell")
        return f"RNN_{str(self.nonlinearity).upper()}" if mode == "RNN" else mode
