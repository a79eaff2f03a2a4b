"""A fused layer without its forward: torch.nn's RNNBase and the options that torch.nn lacks."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor, nn

from fusedrnn import calls
from fusedrnn import layer_norm as norms
from fusedrnn.drop_in import DropIn

# Constructor keywords that torch.nn's classes do not have.
ONLY_OURS = ("recurrent_dropout", "zoneout", "layer_norm")


def _probability(name: str, value: Any) -> bool:
    """Whether the probability `value` is above 0. Raises ValueError where it is none."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1] representing a probability")
    return float(value) > 0


def _number(value: Any) -> float:
    """A Python number, which torch.compile and repr know, in place of NumPy's."""
    return value if type(value) is int else float(value)


class LayerBase(DropIn, nn.RNNBase):
    """torch.nn's RNNBase with the options that torch.nn does not have, and without a forward.

    It adds no state: parameters, checkpoints, hooks and `isinstance` are torch.nn's own, and
    `fusedrnn.swap` converts an instance by changing its class.
    """

    # torch.nn words this error differently from class to class.
    _dim_error = "{}: Expected input to be 2D or 3D, got {}D instead"

    # An instance has these attributes only where they are on: a swapped instance has none of them.
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    layer_norm: bool = False
    recompute: bool = False
    # How a quantized layer stores its weights (fusedrnn/quantized.py).
    stored: str = ""

    def __init__(
        self,
        *args: Any,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        """torch.nn's arguments and more (docs/regularisers.md), which are off by default.

        Args:
            recurrent_dropout: probability of dropout on h before W_hh, one mask for all steps.
            zoneout: probability that a unit keeps its old value at a step; for an LSTM also a pair
                (of h, of c).
            layer_norm: whether the products with W_ih and W_hh, and an LSTM's c on its way to h,
                are normalised. Adds parameters: per layer and direction gain_ih and gain_hh
                (gates * H), for an LSTM gain_c and shift_c (H), with torch.nn's suffixes.
            recompute: whether backward runs forward again in place of memory that forward saves
                (docs/scaling.md).

        Raises:
            ValueError: a probability outside [0, 1]; an RNN with layer_norm.
            TypeError: layer_norm is not a bool.
        """
        # Named here because torch.nn.utils.skip_init looks for `device` in the signature.
        given = {"device": device, "dtype": dtype}
        kwargs |= {k: v for k, v in given.items() if v is not None}
        super().__init__(*args, **kwargs)
        if _probability("recurrent_dropout", recurrent_dropout):
            self.recurrent_dropout = _number(recurrent_dropout)
        if isinstance(zoneout, (tuple, list)):  # a list from a file of settings
            if self.mode != "LSTM" or len(zoneout) != 2:
                raise ValueError("zoneout is one number, or (of h, of c) for an LSTM")
            on = any([_probability("zoneout", z) for z in zoneout])
            zoneout = _number(zoneout[0]), _number(zoneout[1])
        else:
            on = _probability("zoneout", zoneout)
            zoneout = _number(zoneout)
        if on:
            self.zoneout = zoneout
        if not isinstance(layer_norm, bool):
            raise TypeError(f"layer_norm should be of type bool, got: {type(layer_norm).__name__}")
        if layer_norm:
            if self.mode not in ("LSTM", "GRU"):
                raise ValueError("layer_norm is for LSTM and GRU: a plain RNN has none")
            self.layer_norm = True
            norms.add_parameters(self)
        if recompute:
            self.recompute = True

    def reset_parameters(self) -> None:
        if self.layer_norm:
            norms.reset_parameters(self)
        else:
            super().reset_parameters()

    def flatten_parameters(self) -> None:
        # Only torch.nn's CUDA kernels need it, and they know no weights of layer normalisation.
        if not self.layer_norm:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        names = [name for name in (*ONLY_OURS, "recompute") if name in self.__dict__]
        return ", ".join([super().extra_repr(), *(f"{n}={getattr(self, n)}" for n in names)])

    def _weights(self) -> list[Tensor]:
        """In the order of the ops. Most are found without Module.__getattr__, which is slow."""
        parameters, names = self._parameters, self._flat_weights_names
        found: list[Any] = [
            parameters[name] if name in parameters else getattr(self, name) for name in names
        ]
        for name, weight in zip(names, found, strict=True):
            if weight is None:
                raise TypeError(f"{type(self).__name__}: expected Tensor as {name}, got None")
        return found

    def _stack(self) -> tuple[str, int, int, int, bool, bool]:
        """The first fields of `Config`, which describe a stack without options of ours."""
        return (
            self.mode,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            self.bias,
            self.bidirectional,
        )

    def _config(self, all_states: bool = False) -> calls.Config:
        return calls.Config(*self._stack(), *self._zoneout_rates(), all_states, self.layer_norm)

    def _zoneout_rates(self) -> tuple[float, float]:
        """Of h and of c."""
        if isinstance(self.zoneout, tuple):
            return self.zoneout
        return self.zoneout, self.zoneout if self.mode == "LSTM" else 0.0

    def only_ours(self) -> str | None:
        """The options in use that torch.nn's code would ignore, None if there are none."""
        names = None
        for name in ONLY_OURS:
            if getattr(self, name):
                names = f"{names} and {name}" if names else name
        return names
