"""What the ops take and return.

`torch.ops.fusedrnn.forward` runs a whole stack of layers and `torch.ops.fusedrnn.backward` its
back-propagation through time. `torch.ops.fusedrnn.infer` is forward of a plain call, without
reserve unless `save`; it has few arguments and results, which dominate the cost of a small call.
All are defined in csrc/torch. Arguments, with T steps, B rows of the batch, D directions, H hidden
units, P = proj_size or H, L layers:

    x            (T, B, input_size), or (tokens, input_size) with batch_sizes (packed); or integers
                 (T, B), (tokens,), which stand for one-hot vectors as wide as the first w_ih
    hx, cx       (L * D, B, P), (L * D, B, H) or None for zeros; cx of an LSTM only
    weights      torch.nn's, per layer and direction: w_ih, w_hh, [b_ih, b_hh], [w_hr]; with
                 layer_norm then gain_ih, gain_hh (as the biases), an LSTM's gain_c, shift_c (H,);
                 or all with a leading dimension, the weights of an ensemble, whose size divides B:
                 row b has weights b % ensemble
    batch_sizes  int64 (T,), of a PackedSequence
    lengths      integers (B,) in [0, T]: steps of each row of padded input
    mask         uint8 (L - 1, tokens, D * P), the dropout between layers: 1 keeps
    resets       bool (T, B) or (tokens,): where a row begins a new sequence, from zeros
    h_mask       (L * D, B, P), float64 for float64 and float32 for the rest: h is multiplied with
                 it before W_hh (recurrent dropout)
    zone_h       uint8 (L * D, tokens, P), zone_c with H: 1 keeps the unit's old value (zoneout);
                 without them each keeps the part that Config says
    dropout      the probability that mask was drawn with
    save         whether the reserve is filled; without it backward runs forward again to fill one

forward returns y (like x, width D * P), hn, cn (empty but for an LSTM), and the reserve; then, with
all_states and else empty, hs (L - 1, T, B, D * P), the outputs of all layers but the last, and an
LSTM's cs (L, T, B, D * H), in float64 for float64 and float32 for the rest.
infer returns y, hn, cn of an LSTM, and the reserve with `save`; None for what there is not.
`torch.ops.fusedrnn.infer_quantized` is infer with weights that fusedrnn/quantized.py packs, in
float32, with batch_sizes or lengths, the input's width and the format of the weights, and without
reserve.
backward returns the gradients of x, hx, cx and each weight; `needs` says which are required, and
the others are empty. `members` is 0, or a number that divides B: then row b belongs to member
b % members, and the gradients of weights (members, ...) are sums over each member's rows. Of an
ensemble `members` is 0 or a multiple of its size. On the CPU, where no gradient of a weight is
wanted and without ensemble and all_states, y and reserve may be those of B / n rows: then rows
b * n to b * n + n - 1 share what forward saved for row b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn import _C


class Config(NamedTuple):
    """What describes a stack besides its tensors; the ops' arguments of the same names."""

    mode: str
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    all_states: bool = False
    layer_norm: bool = False

    @property
    def out_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def stack(self, dtype: torch.dtype) -> dict[str, Any]:
        """By name, what the functions of _C take of it."""
        return {
            "mode": self.mode,
            "dtype": str(dtype).removeprefix("torch."),
            "hidden_size": self.hidden_size,
            "proj_size": self.proj_size,
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "layer_norm": self.layer_norm,
        }


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and cell states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tokens_shape(x: Tensor) -> torch.Size:
    """(T, B) or (tokens,), also where x is integers."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


def reserve_rows(config: Config, dtype: torch.dtype) -> list[int]:
    """The arrays of a reserve, one after the other: bytes of each that a token has."""
    return _C.reserve_rows(
        **config.stack(dtype),
        zoneout=config.zoneout_h > 0 or config.zoneout_c > 0,
        all_states=config.all_states,
    )


def are_stacked(weights: Sequence[Tensor]) -> bool:
    """Whether they are those of an ensemble."""
    return weights[0].dim() == 3


RESULTS = 5  # of forward that have gradients: y, hn, cn, hs, cs
MADE = 4  # results of forward that backward reads: y, reserve, hs, cs
NON_DIFFERENTIABLE = 7  # tensors between cx and the weights, which have no gradient
NO_OTHERS = (None,) * NON_DIFFERENTIABLE
BATCH_SIZES = 3  # among Call.tensors
FIRST_WEIGHT = 3 + NON_DIFFERENTIABLE  # among Call.tensors
ALL_STATES = 1 + Config._fields.index("all_states")  # among Call.constants
STACK = len(Config._fields) - len(Config._field_defaults)  # of Config, what infer takes
STACK_IN = slice(1, 1 + STACK)  # among Call.constants


class Call(NamedTuple):
    """The arguments shared by both ops, split into tensors and constants."""

    # x, hx, cx, batch_sizes, lengths, mask, resets, h_mask, zone_h, zone_c, *weights
    tensors: tuple[Tensor | None, ...]
    constants: tuple  # dropout, *Config

    @staticmethod
    def of(*arguments: Any) -> Call:
        x, hx, cx, weights, *rest = arguments
        return Call(
            (x, hx, cx, *rest[:NON_DIFFERENTIABLE], *weights), tuple(rest[NON_DIFFERENTIABLE:])
        )

    def arguments(self) -> tuple:
        x, hx, cx, *rest = self.tensors
        return (x, hx, cx, rest[NON_DIFFERENTIABLE:], *rest[:NON_DIFFERENTIABLE], *self.constants)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """x, hx, cx and the weights."""
        return self.tensors[:3] + self.tensors[3 + NON_DIFFERENTIABLE :]

    def with_differentiable(self, tensors: tuple) -> Call:
        others = self.non_differentiable()
        return self._replace(tensors=(*tensors[:3], *others, *tensors[3:]))

    def with_non_differentiable(self, others: tuple) -> Call:
        weights = self.tensors[FIRST_WEIGHT:]
        return self._replace(tensors=(*self.tensors[:3], *others, *weights))

    @property
    def batch_sizes(self) -> Tensor | None:
        return self.tensors[BATCH_SIZES]

    @property
    def stacked(self) -> bool:
        """Whether the weights are those of an ensemble."""
        return self.tensors[FIRST_WEIGHT].dim() == 3  # type: ignore[union-attr]

    def row_dims(self) -> tuple[int | None, ...]:
        """Of each tensor the dimension of rows or tokens: (T, B, ...), packed (tokens, ...)."""
        tokens = 1 if self.batch_sizes is None else 0
        states_and_others = (tokens, 1, 1, None, 0, 1, tokens, 1, 1, 1)
        return states_and_others + (None,) * (len(self.tensors) - len(states_and_others))

    def result_row_dims(self) -> tuple[int, int, int, int, int]:
        """The same of y, hn, cn, hs and cs."""
        tokens = 1 if self.batch_sizes is None else 0
        return tokens, 1, 1, tokens + 1, tokens + 1

    def non_differentiable(self) -> tuple[Tensor | None, ...]:
        return self.tensors[3 : 3 + NON_DIFFERENTIABLE]


def plain_call(x: Any, hx: Any, cx: Any, weights: Any, *stack_and_save: Any) -> tuple[tuple, bool]:
    """The arguments of forward without `save`, and `save`, from those of infer."""
    stack, save = stack_and_save[:STACK], any(stack_and_save[STACK:])
    return (x, hx, cx, weights, *NO_OTHERS, 0.0, *Config(*stack)), save


def plain_results(call: tuple, save: bool, results: tuple) -> tuple:
    """The results of infer from those of forward."""
    y, hn, cn, reserve, *_ = results
    lstm = call[4 + NON_DIFFERENTIABLE + 1] == "LSTM"
    return y, hn, cn if lstm else None, reserve if save else None


class BackwardCall(NamedTuple):
    """The arguments of the backward op."""

    grads: tuple[Tensor | None, ...]  # of y, hn, cn, hs, cs
    made: tuple[Any, ...]  # y, reserve, hs, cs
    needs: list[bool]
    members: int
    call: Call

    @staticmethod
    def of(*arguments: Any) -> BackwardCall:
        grads, made = arguments[:RESULTS], arguments[RESULTS : RESULTS + MADE]
        needs, members, *call = arguments[RESULTS + MADE :]
        return BackwardCall(grads, made, needs, members, Call.of(*call))


# The fields of Config behind those of a stack without options.
NO_OPTIONS = tuple(Config._field_defaults.values())


def is_plain(call: tuple) -> bool:
    """Whether `infer` has all arguments of `call`, which are those of `forward` without `save`."""
    others, options = call[4 : 4 + NON_DIFFERENTIABLE], call[-len(NO_OPTIONS) :]
    return all(o is None for o in others) and options == NO_OPTIONS
