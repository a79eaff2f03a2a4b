"""The forward of the three layers: checks as torch.nn does, then one op for the whole stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

from fusedrnn import (
    autocast,
    batching,
    calls,
    checks,
    decompositions,
    dynamo,
    fakes,
    fast_path,
    flops,
    masks,
    onnx,
    ops,
    reference,
    support,
    tangent_batching,
    tangents,
)
from fusedrnn.layer import LayerBase
from fusedrnn.signatures import AllStates, Input, Lengths, Resets, Results, States


class Fused(LayerBase):
    """What RNN, GRU and LSTM share."""

    def forward(
        self,
        input: Input,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Resets | None = None,
        return_all: bool = False,
    ) -> Results:
        """Runs the stack; see the class.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size)
                unbatched, or a PackedSequence. Integers without the last dimension stand for
                one-hot vectors of input_size: the result is that of torch.nn.functional.one_hot,
                without its cost.
            hx: the initial state, zeros when not given: h_0 (L * D, B, P), for an LSTM a tuple of
                that and c_0 (L * D, B, H); without B for unbatched input.
            lengths: integers (B,) in [0, T] on any device and in any order, as a tensor, an array
                of NumPy or a list: row b has lengths[b] steps. Outputs past them are 0, h_n and c_n
                are those of each row's last step, and the reverse direction starts there. Not with
                a PackedSequence.
            resets: bools, or 0 and 1 of any dtype, shaped as the input without its last dimension
                or with 1 there, or a PackedSequence of such: True where a new sequence begins in
                the middle of a row, such as an episode of reinforcement learning. The forward
                direction enters that step with states of zeros; the reverse direction enters the
                step before it, the last one of the previous sequence, with zeros. So sequences in
                one row are independent. hx is the state before the first step (a reset there
                replaces it by zeros), in the reverse direction before the last.
            return_all: whether the states of every layer at every step are returned as well.

        Returns:
            output and h_n, for an LSTM output and (h_n, c_n), shaped as torch.nn's; with
            return_all a third value, `AllStates`.

        Raises:
            ValueError, RuntimeError: torch.nn's, for the same wrong arguments.
            IndexError: an integer of the input is negative or not below input_size; those past a
                length are ignored. On CUDA a check would have to wait: there such a step is NaN,
                and a length outside [0, T] is clamped.
        """
        if lengths is None and resets is None and not return_all:
            results = fast_path.run(self, input, hx)
            if results is not None:
                return results
        if self._is_leaf(input):
            given = {"lengths": lengths, "resets": resets, "return_all": return_all or None}
            return self._record(input, hx, **{k: v for k, v in given.items() if v is not None})
        packed = isinstance(input, PackedSequence)
        data: Any = input.data if isinstance(input, PackedSequence) else input
        one_hot = support.is_one_hot(data, packed)
        # Features that torch.nn does not have.
        more = lengths is not None or one_hot or resets is not None or return_all
        more = more or self.only_ours() is not None
        batched_only = hx is not None or lengths is not None or resets is not None
        if one_hot and not (packed or batched_only):
            checks.warn_of_features(self, data, 4)
        if not more and (support.fallback_reason(data) or support.torch_instead(self, input, hx)):
            return super().forward(input, hx)
        x, hx, cx, unsort, lengths = checks.canonical(self, input, hx, lengths, one_hot)
        batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
        weights = self._weights()
        dtype = weights[0].dtype if one_hot else x.dtype
        casts = autocast.casts(self, x, dtype, weights[0].dtype, hx, cx, packed)
        if casts is not None:
            low = casts.low
            x, weights = x if one_hot else x.to(low), [w.to(low) for w in weights]
            states: tuple[Any, Any] = hx, cx
            hx, cx = (None if s is None else s.to(low) for s in states)
        if resets is not None:
            resets = checks.checked_resets(self, resets, input, x, one_hot)
        config = self._config(return_all)
        drawn = (
            masks.between_layers(self, x, config),
            resets,
            *masks.of_recurrence(self, x, batch_sizes, weights[0], config),
        )
        # Not always self.dropout: torch.compile(dynamic=True) makes an input of a float.
        dropout = 0.0 if drawn[0] is None else self.dropout
        call = (x, hx, cx, weights, batch_sizes, lengths, *drawn, dropout, *config)
        results = self._run(call, more)
        if results is None:
            return super().forward(input, hx)
        y, hn, cn, hs, cs = results
        if casts is not None:
            y, hn = y.to(casts.output), hn.to(casts.output)
            cn = cn if cn is None else cn.to(casts.cell)
        every = (hs, cs) if return_all else None
        return shaped(self, input, one_hot, unsort, y, hn, cn, every)

    def _run(self, call: tuple, more: bool) -> tuple | None:
        """y, hn, cn, hs, cs of an op, or of the reference where no kernel can and torch.nn cannot.

        cn is an LSTM's, else empty or None; hs and cs may be None without `return_all`. None where
        no kernel can and torch.nn can. `more`: torch.nn has no such call.
        """
        x, hx, cx, weights = call[:4]
        transformed = torch._C._are_functorch_transforms_active()
        dual = transformed and ops.in_forward_mode()
        if (dual and not tangents.has_kernels(calls.Call.of(*call))) or (
            more and support.no_kernel(x) is not None
        ):
            return reference.forward(*call)
        if torch.compiler.is_compiling() and calls.is_plain(call) and not self.recompute:
            # Each argument costs time. With gradients its Autograd key calls the other op.
            return *ops.infer(*call[:4], *self._stack())[:3], None, None
        # A trace is replayed with and without gradients.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if tracing:
            onnx.refuse_tracing(more)
        graph = tracing or (
            torch.is_grad_enabled()
            and ops.require_grad((x, hx, cx, *weights), transformed)
            and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())
        )
        if torch.compiler.is_compiling():
            return ops.run(call, graph, graph and not self.recompute)
        try:
            return ops.run(call, graph, graph and not self.recompute)
        except RuntimeError as error:
            if not support.on_gpu(x) or ops.NOTHING_RUNS not in str(error):
                checks.refuse_devices(x, (hx, cx), weights)
                raise
            return reference.forward(*call) if more or ops.in_forward_mode() else None


def shaped(
    layer: LayerBase,
    input: Any,
    one_hot: bool,
    unsort: Any,
    y: Tensor,
    hn: Tensor,
    cn: Any,
    all: Any,
) -> Any:
    """The results of a call in the form of its `input`; `all`: hs and cs where wanted."""
    packed = isinstance(input, PackedSequence)
    unbatched = not packed and input.dim() + one_hot == 2

    def in_form(steps: Tensor) -> Any:
        if packed:
            return PackedSequence(
                steps, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
        if unbatched:
            return steps.squeeze(1)
        return steps.transpose(0, 1) if layer.batch_first else steps

    lstm = layer.mode == "LSTM"
    states: tuple[Tensor, ...] = (hn, cn) if lstm else (hn,)
    if unsort is not None:
        states = tuple(s.index_select(1, unsort) for s in states)
    if unbatched:
        states = tuple(s.squeeze(1) for s in states)
    results = in_form(y), states if lstm else states[0]
    if all is None:
        return results
    hs, cs = all
    cells = tuple(in_form(c) for c in cs.to(cn.dtype).unbind()) if lstm else None
    return *results, AllStates((*(in_form(h) for h in hs.to(y.dtype).unbind()), results[0]), cells)


dynamo.allow(Fused)
# torch.export.save stores the name of what a program returns.
_pytree._register_namedtuple(AllStates, serialized_type_name="fusedrnn.modules.AllStates")
fakes.register()
flops.register()
decompositions.register()
batching.register()
tangent_batching.register()
