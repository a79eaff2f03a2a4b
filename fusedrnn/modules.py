"""Drop-in `RNN`, `GRU` and `LSTM`: torch.nn's classes with another `forward`.

They add no state, so parameters, checkpoints, hooks and `isinstance` are torch.nn's own, and
`fusedrnn.swap` can turn one into the other by changing an instance's class.
"""

from __future__ import annotations

import warnings
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import checks, cuda, dynamo, masks, ops, reference
from fusedrnn import layer_norm as norms

# What the kernels compute in; any other dtype or device is torch.nn's own business.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KERNEL_DTYPES = DTYPES + INTEGERS
# Constructor keywords that torch.nn's classes do not have.
ONLY_OURS = ("recurrent_dropout", "zoneout", "layer_norm")


def is_one_hot(data: Tensor, packed: bool) -> bool:
    """Whether `data` is integers that stand for one-hot vectors: torch.nn takes none."""
    return data.dtype in INTEGERS and data.dim() < (2 if packed else 3)


def _is_autocast(x: Tensor) -> bool:
    if x.is_meta or not torch._C._is_any_autocast_enabled():
        return False
    return torch.is_autocast_enabled(x.device.type)


_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN_BFLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ONEDNN_FLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _by_onednn(dtype: torch.dtype) -> bool:
    """Whether torch.nn gives padded input of an LSTM without projections to oneDNN on a CPU."""
    if not torch.compiler.is_compiling() and not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.float32:
        return _ONEDNN
    if dtype == torch.bfloat16:
        return _ONEDNN_BFLOAT16
    return _ONEDNN_FLOAT16 and not torch.is_grad_enabled()


_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
}


def _refuse_some_float64(
    low: torch.dtype, input: torch.dtype, weight: torch.dtype, hx: Any, cx: Any
) -> None:
    """Raises torch.nn's error: autocast leaves float64 as it is, so all must be or nothing."""
    states = [s.dtype for s in (hx, cx) if s is not None]
    for dtype in (input, *states):
        if (dtype == torch.float64) != (weight == torch.float64):
            found = [_NAMES.get(d if d == torch.float64 else low, d) for d in (dtype, weight)]
            raise RuntimeError(
                "mat1 and mat2 must have the same dtype, but got {} and {}".format(*found)
            )


def no_kernel(input: Tensor) -> str | None:
    """Why no kernel takes `input`, None where one does."""
    if input.is_cuda:
        reason = cuda.missing(input.device)
        if reason:
            return reason
    elif not input.is_cpu:
        return f"there is no kernel for {input.device.type} tensors yet"
    if input.dtype not in KERNEL_DTYPES:
        return f"there is no kernel for {input.dtype}"
    return None


def fallback_reason(module: nn.RNNBase, input: Tensor) -> str | None:
    """Why `input` would be left to torch.nn's own kernels, None where ours run."""
    reason = no_kernel(input)
    if reason:
        return reason
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace records torch.nn's operators"
    return None


class _DropIn(nn.Module):
    """How tools that know torch.nn's classes by name are to treat ours.

    Not subclasses of ours: their own forward counts, as that of torch.nn's subclasses does.
    """

    def _is_leaf(self, input: Any) -> bool:
        """Whether torch.fx is tracing, and to record the call instead of looking into it."""
        return isinstance(input, fx.Proxy) and type(self).__module__ == __name__

    def _record(self, input: fx.Proxy, hx: Any, **kwargs: Any) -> fx.Proxy:
        path = input.tracer.path_of_module(self)  # type: ignore[attr-defined]
        return input.tracer.create_proxy("call_module", path, (input, hx), kwargs)

    def __repr__(self) -> str:
        """torch.nn's, with the package, so that the `repr` of a model shows what was swapped."""
        text = super().__repr__()
        return f"fusedrnn.{text}" if type(self).__module__ == __name__ else text

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles, and leaves in the model: torch.nn's own class."""
        if type(self).__module__ != __name__:
            return self
        plain = getattr(nn, type(self).__name__)
        regularisers = self.only_ours() if isinstance(self, _Fused) else None
        if regularisers:
            raise ValueError(
                f"torch.jit.script takes torch.nn's class, which has no {regularisers}"
            )
        warnings.warn(
            f"torch.jit.script puts torch.nn.{plain.__name__} in the place of fusedrnn's, also in "
            "the model that it is given: fusedrnn.swap undoes that",
            stacklevel=2,
        )
        twin = nn.Module.__new__(plain)
        twin.__dict__.update(self.__dict__)
        return twin


class AllStates(NamedTuple):
    """The states of every layer at every step: `h[l]` is shaped as the output, behind a length 0.

    h of the last layer is the output itself; of an LSTM `c[l]` has hidden_size in place of
    proj_size; None for the others. The directions lie side by side, as in the output. Of packed
    input each is a PackedSequence.
    """

    h: tuple[Any, ...]
    c: tuple[Any, ...] | None


def _probability(name: str, value: Any) -> bool:
    """Whether `value`, which must be a probability, is above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1] representing a probability")
    return float(value) > 0


def _number(value: Any) -> float:
    """Of NumPy's numbers too, as Python's own, which torch.compile and repr know."""
    return value if type(value) is int else float(value)


class _Fused(_DropIn, nn.RNNBase):
    """What the three modules share: torch.nn's checks, then one op for the whole stack."""

    # torch.nn words this error differently from class to class.
    _dim_error = "{}: Expected input to be 2D or 3D, got {}D instead"

    # What torch.nn does not have. An instance has them only where they are on: what `swap` turns
    # into one of ours has torch.nn's attributes alone.
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    layer_norm: bool = False
    # Whether backward runs forward again for what it needs, in place of keeping it.
    recompute: bool = False

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
        """torch.nn's arguments, and what docs/regularisers.md describes, off by default.

        Args:
            recurrent_dropout: the probability with which h is dropped before W_hh, one mask for
                all steps.
            zoneout: the probability with which a unit keeps its old value, for an LSTM also
                (of h, of c).
            layer_norm: whether the products with W_ih and W_hh, and an LSTM's c on its way to h,
                are normalised. Adds parameters: per layer and direction gain_ih and gain_hh
                (gates * H), for an LSTM gain_c and shift_c (H), with torch.nn's suffixes.
            recompute: whether backward runs forward again for what it needs, in place of keeping it
                (docs/scaling.md).

        Raises:
            ValueError: a number is no probability; an RNN with layer_norm.
            TypeError: layer_norm is no bool.
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
        # For torch.nn's CUDA kernels, which take no other weights than their own.
        if not self.layer_norm:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        names = [name for name in (*ONLY_OURS, "recompute") if name in self.__dict__]
        return ", ".join([super().extra_repr(), *(f"{n}={getattr(self, n)}" for n in names)])

    def _weights(self) -> list[Tensor]:
        """torch.nn's, in its order; looked up where they mostly are before Module looks."""
        parameters = self._parameters
        return [
            parameters[name] if name in parameters else getattr(self, name)  # type: ignore[misc]
            for name in self._flat_weights_names
        ]

    def _stack(self) -> tuple[str, int, int, int, bool, bool]:
        """What describes a plain stack: the first fields of `Config`."""
        return (
            self.mode,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            self.bias,
            self.bidirectional,
        )

    def _config(self, all_states: bool = False) -> ops.Config:
        return ops.Config(*self._stack(), *self._zoneout_rates(), all_states, self.layer_norm)

    def _zoneout_rates(self) -> tuple[float, float]:
        """Of h and of c."""
        if isinstance(self.zoneout, tuple):
            return self.zoneout
        return self.zoneout, self.zoneout if self.mode == "LSTM" else 0.0

    def only_ours(self) -> str | None:
        """What this module does that torch.nn's code would leave out, if anything."""
        if not (self.recurrent_dropout or self.zoneout or self.layer_norm):
            return None
        names = [name for name in ONLY_OURS if getattr(self, name)]
        return " and ".join(names)

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        resets: Any = None,
        return_all: bool = False,
    ) -> Any:
        """Runs the stack; see the class.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size)
                unbatched, or a PackedSequence. Integers without the last dimension stand for
                one-hot vectors of input_size: results are those of torch.nn.functional.one_hot,
                at none of its cost.
            hx: the initial state, zeros when not given: h_0 (L * D, B, P), for an LSTM a tuple of
                that and c_0 (L * D, B, H); without B for unbatched input.
            lengths: integers (B,) in [0, T] on any device and in any order, as a tensor, an array
                of NumPy or a list: row b has lengths[b] steps. Outputs past them are 0, h_n and c_n
                are those of each row's last step, and the reverse direction starts there. Not with
                a PackedSequence.
            resets: bools, or 0 and 1 of any dtype, shaped as the input without its last dimension
                or with 1 there, or a PackedSequence of such: True where a new sequence begins in
                the middle of a row, as where an episode of reinforcement learning ends and the next
                one starts. The forward direction enters that step with states of zeros; the reverse
                direction enters the step before it, the last one of the sequence that ended, with
                zeros. So sequences in one row know as little of each other as those in two. hx is
                the state before the first step (which a reset there replaces by zeros), in the
                reverse direction before the last.
            return_all: whether the states of every layer at every step are returned as well.

        Returns:
            output and h_n, for an LSTM output and (h_n, c_n), shaped as torch.nn's; with
            return_all a third value, `AllStates`.

        Raises:
            ValueError, RuntimeError: torch.nn's, for the same wrong arguments.
            IndexError: an integer of the input is negative or not below input_size. Those behind
                a length are not looked at. On CUDA, where looking would mean waiting, such a step
                is NaN, and a length outside [0, T] counts as the nearer end.
        """
        if lengths is None and resets is None and not return_all:
            results = self._plain(input, hx)
            if results is not None:
                return results
        if self._is_leaf(input):
            given = {"lengths": lengths, "resets": resets, "return_all": return_all or None}
            return self._record(input, hx, **{k: v for k, v in given.items() if v is not None})
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        one_hot = is_one_hot(data, packed)
        # What CUDA kernels do not have; what torch.nn does not have.
        cpu_only = resets is not None or return_all or self.only_ours() is not None
        more = cpu_only or lengths is not None or one_hot
        batched_only = hx is not None or lengths is not None or resets is not None
        if one_hot and not (packed or batched_only):
            checks.warn_of_features(self, input, 4)
        if not more and fallback_reason(self, data):
            return super().forward(input, hx)
        x, hx, cx, unsort, lengths = checks.canonical(self, input, hx, lengths, one_hot)
        batch_sizes = input.batch_sizes if packed else None
        weights = self._weights()
        dtypes = low = None
        dtype = weights[0].dtype if one_hot else x.dtype
        if _is_autocast(x):
            low = torch.get_autocast_dtype(x.device.type)
            _refuse_some_float64(low, dtype, weights[0].dtype, hx, cx)
        if low is not None and dtype != torch.float64:
            dtypes = low, low
            if not x.is_cuda:
                # Elements are multiplied with the cell state, in a GRU with h.
                held = dtype if hx is None else (hx if cx is None else cx).dtype
                plain = not packed and x.numel() > 0
                dtypes = self._autocast_dtypes(held, low, plain and _by_onednn(dtype))
            x, weights = x if one_hot else x.to(low), [w.to(low) for w in weights]
            hx, cx = (None if s is None else s.to(low) for s in (hx, cx))

        # A trace is replayed with and without gradients.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        graph = tracing or (
            torch.is_grad_enabled()
            and any(t.requires_grad for t in (x, hx, cx, *weights) if t is not None)
        )
        # torch.func's transforms, and what torch.nn lacks where no kernel has it either.
        by_reference = torch._C._are_functorch_transforms_active() or (
            more and no_kernel(x) is not None
        )
        if resets is not None:
            resets = checks.checked_resets(self, resets, input, x, one_hot)
        config = self._config(return_all)
        drawn = (
            masks.between_layers(self, x, config),
            resets,
            *masks.of_recurrence(self, x, batch_sizes, weights[0], config),
        )
        # Not self.dropout in any case: torch.compile(dynamic=True) takes a float for an input.
        dropout = 0.0 if drawn[0] is None else self.dropout
        call = (x, hx, cx, weights, batch_sizes, lengths, *drawn, dropout, *config)
        if by_reference or (cpu_only and not x.is_cpu):
            y, hn, cn, hs, cs = reference.forward(*call)
        else:
            y, hn, cn, hs, cs = ops.run(call, graph, graph and not self.recompute)
        if dtypes is not None:
            y, hn, cn = y.to(dtypes[0]), hn.to(dtypes[0]), cn.to(dtypes[1])

        unbatched = not packed and input.dim() + one_hot == 2

        def shaped(steps: Tensor) -> Any:
            if packed:
                return PackedSequence(
                    steps, batch_sizes, input.sorted_indices, input.unsorted_indices
                )
            if unbatched:
                return steps.squeeze(1)
            return steps.transpose(0, 1) if self.batch_first else steps

        states: tuple[Tensor, ...] = (hn, cn) if self.mode == "LSTM" else (hn,)
        if unsort is not None:
            states = tuple(s.index_select(1, unsort) for s in states)
        if unbatched:
            states = tuple(s.squeeze(1) for s in states)
        results = shaped(y), states if self.mode == "LSTM" else states[0]
        if not return_all:
            return results
        cells = None
        if self.mode == "LSTM":
            cells = tuple(shaped(c) for c in cs.to(cn.dtype).unbind())
        return *results, AllStates(
            (*(shaped(h) for h in hs.to(y.dtype).unbind()), results[0]), cells
        )

    def _plain(self, input: Any, hx: Any) -> Any:
        """What `forward` does for a call with nothing but input and states, where nobody looks on.

        A step of a small layer takes less time than what other calls need. None where this is
        another call, or one that the op refuses: then torch.nn's checks have to say what is wrong.
        """
        if (
            type(input) is not Tensor
            or type(self).__module__ != __name__  # a subclass may check otherwise
            # no_kernel without the call, where it is as quick
            or not ((input.is_cpu and input.dtype in KERNEL_DTYPES) or no_kernel(input) is None)
            or (self.training and self.dropout)
            or self.only_ours()
            or torch._C._is_any_autocast_enabled()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        lstm = self.mode == "LSTM"
        h = c = None
        if hx is not None:
            h, c = hx if lstm and type(hx) is tuple and len(hx) == 2 else (hx, None)
            if not isinstance(h, Tensor) or (lstm and not isinstance(c, Tensor)):
                return None
        parameters = self._parameters
        try:
            weights: list[Any] = [parameters[name] for name in self._flat_weights_names]
        except KeyError:  # parametrized: looked at twice it could be drawn twice
            return None
        tensors = (*weights, input, h, c)
        if not ops.eager(tensors):
            return None
        one_hot = not input.is_floating_point()
        sizes = input.shape
        dim = len(sizes) + one_hot
        if (
            dim not in (2, 3)
            or 0 in sizes
            or not (one_hot or sizes[-1] == self.input_size)
            or (h is not None and h.dim() != dim)
            or (c is not None and c.dim() != dim)
        ):
            return None
        x: Any = input
        if dim == 2:
            x, h, c = (None if t is None else t.unsqueeze(1) for t in (x, h, c))
        elif self.batch_first:
            x = x.transpose(0, 1)
        graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        save = graph and not self.recompute
        try:
            y, hn, cn = ops.run_plain(x, h, c, weights, self._stack(), graph, save)
        except RuntimeError as error:
            if "fusedrnn: " not in str(error):
                raise  # not the op's: a hook's on saved tensors, say
            return None
        if one_hot and hx is None:
            checks.warn_of_features(self, input, 5)
        if dim == 2:
            y, hn = y.squeeze(1), hn.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        if not lstm:
            return y, hn
        return y, (hn, cn.squeeze(1) if dim == 2 else cn)

    def _autocast_dtypes(
        self, given: torch.dtype, low: torch.dtype, onednn: bool
    ) -> tuple[torch.dtype, torch.dtype]:
        """torch.nn's dtypes under autocast on the CPU, of the output and h, and of c.

        They follow from which of ATen's paths a case takes: an element-wise product with the
        `given` state has a dtype that holds both, a matrix product that of autocast, and so has
        all that `onednn` computes, which is LSTM alone. On CUDA everything is, by cuDNN.
        """
        wide = torch.promote_types(given, low)
        if self.mode == "GRU":
            return wide, wide
        if self.mode == "LSTM" and self.proj_size:
            return low, wide
        if self.mode == "LSTM" and not onednn:
            return wide, wide
        return low, low


dynamo.allow(_Fused)


class RNN(_Fused, nn.RNN):
    __doc__ = nn.RNN.__doc__
    _dim_error = "{}: Expected input to be 2D or 3D, got {}D tensor instead"


class GRU(_Fused, nn.GRU):
    __doc__ = nn.GRU.__doc__


class LSTM(_Fused, nn.LSTM):
    __doc__ = nn.LSTM.__doc__


class _SingleStep(_DropIn):
    def forward(self, input: Any, hx: Any = None) -> Any:
        if self._is_leaf(input):
            return self._record(input, hx)
        return super().forward(input, hx)


class RNNCell(_SingleStep, nn.RNNCell):
    __doc__ = nn.RNNCell.__doc__


class GRUCell(_SingleStep, nn.GRUCell):
    __doc__ = nn.GRUCell.__doc__


class LSTMCell(_SingleStep, nn.LSTMCell):
    __doc__ = nn.LSTMCell.__doc__
