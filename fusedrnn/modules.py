"""The public classes: `RNN`, `GRU`, `LSTM` and their single-step cells."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.types import Device

from fusedrnn.fused import Fused
from fusedrnn.signatures import AllStates
from fusedrnn.single_step import SingleStep

if TYPE_CHECKING:
    from fusedrnn.signatures import OneState, OneStateCell, TwoStates, TwoStatesCell
else:  # without the types of calls
    OneState = TwoStates = Fused
    OneStateCell = TwoStatesCell = SingleStep

__all__ = ["GRU", "LSTM", "RNN", "AllStates", "GRUCell", "LSTMCell", "RNNCell"]

Class = TypeVar("Class")
Init = TypeVar("Init", bound=Callable[..., None])


def _signature(init: Init) -> Init:
    """The signature of `init`, for readers and tools; torch.nn checks the arguments."""

    @functools.wraps(init)
    def __init__(self: Fused, *args: Any, **kwargs: Any) -> None:
        Fused.__init__(self, *args, **kwargs)

    return __init__  # type: ignore[return-value]


def _names(cls: type[Class]) -> type[Class]:
    """Gives `cls` the shared forward as its own, whose name Python's errors of a call say."""
    shared: Any = cls.forward  # type: ignore[attr-defined]
    own = FunctionType(
        shared.__code__,
        shared.__globals__,
        shared.__name__,
        shared.__defaults__,
        shared.__closure__,
    )
    own.__kwdefaults__, own.__annotations__ = shared.__kwdefaults__, shared.__annotations__
    own.__doc__, own.__module__ = shared.__doc__, shared.__module__
    own.__qualname__ = f"{cls.__name__}.forward"
    cls.forward = own  # type: ignore[attr-defined]
    return cls


@_names
class RNN(OneState, nn.RNN):
    """A stack of Elman RNN layers: `torch.nn.RNN` with fused kernels and more.

    Each layer and direction computes, with f = tanh or relu,

        h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    x_t of a layer above the first is the output of the layer below, after dropout. Formula,
    parameters and their initialisation are torch.nn's: weight_ih_l[k] (H, input of the layer),
    weight_hh_l[k] (H, H), bias_ih_l[k] and bias_hh_l[k] (H,), with the suffix `_reverse` for the
    reverse direction, where H is hidden_size.

    Args:
        input_size (int): number of features of the input.
        hidden_size (int): number of features of the hidden state, H.
        num_layers (int): number of layers L. Default: 1.
        nonlinearity (str): "tanh" or "relu". Default: "tanh".
        bias (bool): whether the layers have b_ih and b_hh. Default: True.
        batch_first (bool): whether input and output are (B, T, features) in place of
            (T, B, features); states are not affected. Default: False.
        dropout (float): probability of dropout on the outputs of each layer but the last, in
            training. Default: 0.
        bidirectional (bool): whether each layer also runs in reverse. Default: False.
        device (torch.device): of the parameters. Default: torch's.
        dtype (torch.dtype): float64, float32, bfloat16 or float16. Default: torch's.
        recurrent_dropout (float): probability of dropout on h before W_hh, one mask for all steps
            (docs/regularisers.md). Not in torch.nn. Default: 0.
        zoneout (float): probability that a unit keeps its old value at a step. Not in torch.nn.
            Default: 0.
        recompute (bool): whether backward runs forward again in place of memory that forward
            saves (docs/scaling.md). Not in torch.nn. Default: False.

    Call with `(input, h_0)`; see `forward` for shapes and for `lengths`, `resets`, `return_all`.

    Raises:
        ValueError: torch.nn's, for the same wrong arguments; a probability outside [0, 1].

    Example:
        >>> rnn = fusedrnn.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _dim_error = "{}: Expected input to be 2D or 3D, got {}D tensor instead"

    @_signature
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        recompute: bool = False,
    ) -> None: ...


@_names
class GRU(OneState, nn.GRU):
    """A stack of GRU (gated recurrent unit) layers: `torch.nn.GRU` with fused kernels and more.

    Each layer and direction computes

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    x_t of a layer above the first is the output of the layer below, after dropout. Formula,
    parameters and their initialisation are torch.nn's: weight_ih_l[k] (3H, input of the layer),
    weight_hh_l[k] (3H, H), bias_ih_l[k] and bias_hh_l[k] (3H,), gates in the order r, z, n, with
    the suffix `_reverse` for the reverse direction, where H is hidden_size.

    Args:
        input_size (int): number of features of the input.
        hidden_size (int): number of features of the hidden state, H.
        num_layers (int): number of layers L. Default: 1.
        bias (bool): whether the layers have b_ih and b_hh. Default: True.
        batch_first (bool): whether input and output are (B, T, features) in place of
            (T, B, features); states are not affected. Default: False.
        dropout (float): probability of dropout on the outputs of each layer but the last, in
            training. Default: 0.
        bidirectional (bool): whether each layer also runs in reverse. Default: False.
        device (torch.device): of the parameters. Default: torch's.
        dtype (torch.dtype): float64, float32, bfloat16 or float16. Default: torch's.
        recurrent_dropout (float): probability of dropout on h before W_hh, one mask for all steps
            (docs/regularisers.md). Not in torch.nn. Default: 0.
        zoneout (float): probability that a unit keeps its old value at a step. Not in torch.nn.
            Default: 0.
        layer_norm (bool): whether the products with W_ih and W_hh are normalised, which adds the
            parameters gain_ih_l[k] and gain_hh_l[k] (3H,). Not in torch.nn. Default: False.
        recompute (bool): whether backward runs forward again in place of memory that forward
            saves (docs/scaling.md). Not in torch.nn. Default: False.

    Call with `(input, h_0)`; see `forward` for shapes and for `lengths`, `resets`, `return_all`.

    Raises:
        ValueError: torch.nn's, for the same wrong arguments; a probability outside [0, 1].
        TypeError: torch.nn's; layer_norm is not a bool.

    Example:
        >>> gru = fusedrnn.GRU(10, 20, bidirectional=True)
        >>> output, h_n = gru(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 0]))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    @_signature
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        recompute: bool = False,
    ) -> None: ...


@_names
class LSTM(TwoStates, nn.LSTM):
    """A stack of LSTM (long short-term memory) layers: `torch.nn.LSTM` with fused kernels and more.

    Each layer and direction computes

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t), with proj_size h_t = W_hr (o_t * tanh(c_t))

    x_t of a layer above the first is the output of the layer below, after dropout. Formula,
    parameters and their initialisation are torch.nn's: weight_ih_l[k] (4H, input of the layer),
    weight_hh_l[k] (4H, P), bias_ih_l[k] and bias_hh_l[k] (4H,), gates in the order i, f, g, o, with
    proj_size weight_hr_l[k] (P, H), with the suffix `_reverse` for the reverse direction, where H
    is hidden_size and P is proj_size or else H.

    Args:
        input_size (int): number of features of the input.
        hidden_size (int): number of features of the cell state, H.
        num_layers (int): number of layers L. Default: 1.
        bias (bool): whether the layers have b_ih and b_hh. Default: True.
        batch_first (bool): whether input and output are (B, T, features) in place of
            (T, B, features); states are not affected. Default: False.
        dropout (float): probability of dropout on the outputs of each layer but the last, in
            training. Default: 0.
        bidirectional (bool): whether each layer also runs in reverse. Default: False.
        proj_size (int): number of features of a projected hidden state, below hidden_size
            (https://arxiv.org/abs/1402.1128); 0 for no projection. Default: 0.
        device (torch.device): of the parameters. Default: torch's.
        dtype (torch.dtype): float64, float32, bfloat16 or float16. Default: torch's.
        recurrent_dropout (float): probability of dropout on h before W_hh, one mask for all steps
            (docs/regularisers.md). Not in torch.nn. Default: 0.
        zoneout (float or pair): probability that a unit keeps its old value at a step, for h and c
            or as (of h, of c). Not in torch.nn. Default: 0.
        layer_norm (bool): whether the products with W_ih and W_hh, and c on its way to h, are
            normalised, which adds the parameters gain_ih_l[k] and gain_hh_l[k] (4H,), gain_c_l[k]
            and shift_c_l[k] (H,). Not in torch.nn. Default: False.
        recompute (bool): whether backward runs forward again in place of memory that forward
            saves (docs/scaling.md). Not in torch.nn. Default: False.

    Call with `(input, (h_0, c_0))`; see `forward` for shapes and for `lengths`, `resets`,
    `return_all`.

    Raises:
        ValueError: torch.nn's, for the same wrong arguments; a probability outside [0, 1].
        TypeError: torch.nn's; layer_norm is not a bool.

    Example:
        >>> lstm = fusedrnn.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
    """

    @_signature
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        recompute: bool = False,
    ) -> None: ...


@_names
class RNNCell(OneStateCell, nn.RNNCell):
    """One step of one RNN layer: `torch.nn.RNNCell`, whose operator it runs.

    h' = f(W_ih x + b_ih + W_hh h + b_hh), f = tanh or relu. Called with x (B, input_size) or
    (input_size,) and h (B, hidden_size) or (hidden_size,), zeros by default; returns h'.

    Example:
        >>> cell = fusedrnn.RNNCell(10, 20)
        >>> cell(torch.randn(3, 10), torch.zeros(3, 20)).shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)


@_names
class GRUCell(OneStateCell, nn.GRUCell):
    """One step of one GRU layer: `torch.nn.GRUCell`, whose operator it runs.

    The formula is that of `GRU`. Called with x (B, input_size) or (input_size,) and h
    (B, hidden_size) or (hidden_size,), zeros by default; returns h'.

    Example:
        >>> cell = fusedrnn.GRUCell(10, 20)
        >>> cell(torch.randn(3, 10), torch.zeros(3, 20)).shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)


@_names
class LSTMCell(TwoStatesCell, nn.LSTMCell):
    """One step of one LSTM layer: `torch.nn.LSTMCell`, whose operator it runs.

    The formula is that of `LSTM`. Called with x (B, input_size) or (input_size,) and (h, c), each
    (B, hidden_size) or (hidden_size,), zeros by default; returns (h', c').

    Example:
        >>> cell = fusedrnn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
