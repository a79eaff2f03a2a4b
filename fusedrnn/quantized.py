"""The layers that `fusedrnn.quantize` makes: inference with weights in fewer bytes.

Their weights are buffers, packed as csrc/cpu/product/words.h describes; layer k of a stack has

    weight_ih_l[k]_int8     uint8, 128 + weight / scale of its row     (weight_hh, weight_hr alike)
    weight_ih_l[k]_scale    float32 (gates * H,)
    bias_ih_l[k]            float32, torch.nn's                        (bias_hh alike)

or weight_ih_l[k]_bfloat16 without scales, with the suffixes of torch.nn (`l0_reverse_int8`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import checks, modules, ops, support
from fusedrnn.fused import shaped
from fusedrnn.layer import LayerBase

KINDS = ("int8", "bfloat16")
ROWS = 16  # rows of a gate in a block
WORD, LINE = 4, 64  # bytes


def _blocks(weight: Tensor, gates: int, fill: float) -> Tensor:
    """`weight` (gates * H, K) of an 8-bit or bfloat16 dtype in the order of words.h."""
    per_word, per_line = WORD // weight.itemsize, LINE // weight.itemsize
    w = weight.view(gates, -1, weight.shape[1])
    w = pad(w, (0, -w.shape[2] % per_line, 0, -w.shape[1] % ROWS), value=fill)
    w = w.view(gates, w.shape[1] // ROWS, ROWS, -1, per_word).permute(1, 0, 3, 2, 4)
    return w.reshape(w.shape[0] * gates, -1).contiguous()


def _rows(blocks: Tensor, gates: int, rows: int, columns: int) -> Tensor:
    """Undoes `_blocks`: (gates * rows, columns)."""
    per_word = WORD // blocks.itemsize
    w = blocks.view(blocks.shape[0] // gates, gates, -1, ROWS, per_word).permute(1, 0, 3, 2, 4)
    w = w.reshape(gates, w.shape[1] * ROWS, -1)
    return w[:, :rows, :columns].reshape(gates * rows, columns)


def pack(weight: Tensor, gates: int, kind: str) -> dict[str, Tensor]:
    """The buffers of a finite weight (gates * H, K), by the ends of their names."""
    if kind == "bfloat16":
        return {kind: _blocks(weight.to(torch.bfloat16), gates, 0)}
    scale = weight.abs().amax(1) / 127
    wide = scale.double().unsqueeze(1)  # a scale may be a subnormal number, or 0
    units = torch.where(wide > 0, weight.double() / wide, 0).round()
    return {
        kind: _blocks((units.clamp(-127, 127) + 128).to(torch.uint8), gates, 128),
        "scale": scale,
    }


def unpack(packed: dict[str, Tensor], gates: int, rows: int, columns: int) -> Tensor:
    """The weight (gates * rows, columns) in float32, as `pack` rounded it."""
    if "scale" not in packed:
        return _rows(packed["bfloat16"], gates, rows, columns).float()
    units = _rows(packed["int8"], gates, rows, columns).float() - 128
    return units * packed["scale"].unsqueeze(1)


class Quantized(LayerBase):
    """What the quantized layers share; `fusedrnn.quantize` makes them of other layers."""

    stored: str  # one of KINDS
    _names: tuple[str, ...]  # of the buffers, in the order of the op

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__.removeprefix("Quantized")
        raise TypeError(f"make a fusedrnn.{name}, and call fusedrnn.quantize on it")

    def _is_public(self) -> bool:
        return type(self).__module__ == __name__

    def forward(self, input: Any, hx: Any = None, *, lengths: Any = None) -> Any:
        """Runs the stack in float32, as `fusedrnn.LSTM` and the others do in eval mode.

        Args:
            input, hx, lengths: as those layers take them, in float32 or integers, on the CPU.

        Returns:
            output and the final states, as those layers; they have no gradient.

        Raises:
            RuntimeError: the layer is in training mode, or a tensor is not on the CPU.
            ValueError, RuntimeError, IndexError: as those layers, for the same wrong arguments.
        """
        if self._is_leaf(input):
            given = {} if lengths is None else {"lengths": lengths}
            return self._record(input, hx, **given)
        self._check_mode()
        if lengths is None:
            results = self._plain(input, hx)
            if results is not None:
                return results
        return self._checked(input, hx, lengths)

    def _check_mode(self) -> None:
        if self.training:
            raise RuntimeError(
                f"{self._get_name()} has quantized weights, which cannot be trained: call "
                "model.eval(), or fusedrnn.dequantize(model) to train it"
            )

    def _check_devices(self, data: Tensor, hx: Any) -> None:
        for t in (data, *(hx if isinstance(hx, tuple) else (hx,))):
            if isinstance(t, Tensor) and t.device.type not in ("cpu", "meta"):
                raise RuntimeError(
                    f"{self._get_name()} runs on the CPU, got a tensor on {t.device}: "
                    "fusedrnn.dequantize(model) before the model is moved there"
                )

    def _plain(self, input: Any, hx: Any) -> Any:
        """A call of a tensor with its batch; None where this is another or a wrong one."""
        if (
            type(input) is not Tensor
            or not input.is_cpu
            or input.dtype != torch.float32
            or input.dim() != 3
            or 0 in input.shape
            or torch._C._is_any_autocast_enabled()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        lstm = self.mode == "LSTM"
        h = c = None
        if hx is not None:
            h, c = hx if lstm and type(hx) is tuple and len(hx) == 2 else (hx, None)
            if type(h) is not Tensor or (lstm and type(c) is not Tensor):
                return None
        if not ops.can_skip_dispatch((input, h, c)):
            return None
        x = input.transpose(0, 1) if self.batch_first else input
        try:
            y, hn, cn = ops.call_below_autograd(
                ops.infer_quantized, x, h, c, self._stored_weights(), *self._rest()
            )
        except RuntimeError as error:
            if "fusedrnn: " not in str(error):
                raise
            return None
        if self.batch_first:
            y = y.transpose(0, 1)
        return y, (hn, cn) if lstm else hn

    def _refuse_transforms(self) -> NoReturn:
        raise RuntimeError(
            f"{self._get_name()} has quantized weights, which torch.func does not take: call "
            "fusedrnn.dequantize(model) first"
        )

    def _refuse_torchscript(self, function: str) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.{function} knows no {self._get_name()}: torch.export takes it, or "
            "fusedrnn.dequantize(model) before"
        )

    def _checked(self, input: Any, hx: Any, lengths: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            self._refuse_transforms()
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            self._refuse_torchscript("trace")
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        one_hot = support.is_one_hot(data, packed)
        if one_hot and not packed and hx is None and lengths is None:
            checks.warn_of_features(self, input, 4)
        self._check_devices(data, hx)
        x, h, c, unsort, lengths = checks.canonical(self, input, hx, lengths, one_hot)
        if not one_hot:
            x = x.float()  # autocast's, as checks.canonical refuses others
        h, c = (None if s is None else s.float() for s in (h, c))
        batch_sizes = input.batch_sizes if packed else None
        weights = self._stored_weights()
        y, hn, cn = ops.infer_quantized(x, h, c, weights, *self._rest(batch_sizes, lengths))
        return shaped(self, input, one_hot, unsort, y, hn, cn, None)

    def _stored_weights(self) -> list[Any]:
        buffers = self._buffers
        return [buffers[name] for name in self._names]

    def _rest(self, batch_sizes: Any = None, lengths: Any = None) -> tuple[Any, ...]:
        """The op's arguments after the weights."""
        return batch_sizes, lengths, *self._stack(), self.input_size, self.stored

    @property
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        """What torch.nn's and our checks ask for the dtype of a call."""
        return [torch.empty(0, dtype=torch.float32)]

    def __getstate__(self) -> dict[str, Any]:  # torch.nn's are about flat weights
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def flatten_parameters(self) -> None:
        """Does nothing: there are no parameters."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.stored}"

    def __prepare_scriptable__(self) -> nn.Module:
        self._refuse_torchscript("script")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for t in self._buffers.values():
            if t is None:
                continue
            made = fn(torch.empty(0, dtype=t.dtype, device=t.device))
            if made.device.type not in ("cpu", "meta"):
                raise RuntimeError(
                    f"{self._get_name()} runs on the CPU, and cannot be moved to {made.device}: "
                    "fusedrnn.dequantize(model) before"
                )
            if made.dtype != t.dtype:
                raise RuntimeError(
                    f"{self._get_name()} computes in float32, and cannot be converted to "
                    f"{made.dtype}: fusedrnn.dequantize(model) before"
                )
        return nn.Module._apply(self, fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        first, errors = f"{prefix}weight_ih_l0", rest[-1]
        found = [kind for kind in KINDS if f"{first}_{kind}" in state_dict]
        found += ["float32"] if first in state_dict else []
        if not found or self.stored in found:
            return super()._load_from_state_dict(state_dict, prefix, *rest)
        advice = (
            "load it into the model before fusedrnn.quantize"
            if found == ["float32"]
            else f'load it into a model of fusedrnn.quantize(model, weights="{found[0]}")'
        )
        errors.append(
            f"{prefix.removesuffix('.') or self._get_name()} has weights in {self.stored}, and "
            f"those of the state_dict are in {found[0]}: {advice}"
        )


class QuantizedRNN(Quantized):
    """A quantized `fusedrnn.RNN`, made by `fusedrnn.quantize`."""


class QuantizedGRU(Quantized):
    """A quantized `fusedrnn.GRU`, made by `fusedrnn.quantize`."""


class QuantizedLSTM(Quantized):
    """A quantized `fusedrnn.LSTM`, made by `fusedrnn.quantize`."""

    _dim_error = modules.LSTM._dim_error


def _matrices(layer: LayerBase) -> list[tuple[str, int, int, int]]:
    """(name, gates, rows of each, columns) of every weight matrix, in torch.nn's order."""
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    out, found = layer.proj_size or layer.hidden_size, []
    for k in range(layer.num_layers):
        width = layer.input_size if k == 0 else out * (1 + layer.bidirectional)
        for end in ("", "_reverse")[: 1 + layer.bidirectional]:
            found.append((f"weight_ih_l{k}{end}", gates, layer.hidden_size, width))
            found.append((f"weight_hh_l{k}{end}", gates, layer.hidden_size, out))
            if layer.proj_size:
                found.append((f"weight_hr_l{k}{end}", 1, out, layer.hidden_size))
    return found


def _buffer_names(layer: LayerBase, kind: str) -> tuple[str, ...]:
    """Of all weights, in the order of the op."""
    names: list[str] = []
    for group in layer._all_weights:
        names += [f"{name}_{kind}" if name.startswith("weight") else name for name in group]
        if kind == "int8":
            names += [f"{name}_scale" for name in group if name.startswith("weight")]
    return tuple(names)


def to_quantized(layer: Any, kind: str) -> None:
    """Makes a float32 layer of torch.nn or fusedrnn a quantized one, in place."""
    packed: dict[str, Tensor] = {}
    for name, gates, _, _ in _matrices(layer):
        parts = pack(getattr(layer, name).detach(), gates, kind)
        packed |= {f"{name}_{end}": t for end, t in parts.items()}
    for name in [n for group in layer._all_weights for n in group]:
        if name.startswith("bias"):
            packed[name] = getattr(layer, name).detach().clone()
        delattr(layer, name)
    for name in ("_flat_weights", "_flat_weight_refs"):
        layer.__dict__.pop(name, None)
    layer._flat_weights_names = []
    layer.__class__ = CLASSES[next(c for c in CLASSES if isinstance(layer, c))]
    layer.stored, layer._names = kind, _buffer_names(layer, kind)
    for name in layer._names:
        layer.register_buffer(name, packed[name])


def to_float(layer: Any) -> None:
    """Makes a quantized layer fusedrnn's ordinary one with the weights as they were rounded."""
    matrices = {name: shape for name, *shape in _matrices(layer)}
    buffers = dict(layer._buffers)
    for name in layer._names:
        delattr(layer, name)
    kind = layer.__dict__.pop("stored")
    del layer._names
    layer.__class__ = next(
        fused for fused, quantized in CLASSES_OF_FUSED.items() if type(layer) is quantized
    )
    for name in [n for group in layer._all_weights for n in group]:
        weight: Any = buffers.get(name)
        if name in matrices:
            ends = (kind, "scale") if kind == "int8" else (kind,)
            weight = unpack({end: buffers[f"{name}_{end}"] for end in ends}, *matrices[name])
        layer.register_parameter(name, nn.Parameter(weight))
    layer._flat_weights_names = [n for group in layer._all_weights for n in group]
    layer._init_flat_weights()


CLASSES_OF_FUSED: dict[type, type] = {
    modules.RNN: QuantizedRNN,
    modules.GRU: QuantizedGRU,
    modules.LSTM: QuantizedLSTM,
}
CLASSES: dict[type, type] = {
    nn.RNN: QuantizedRNN,
    nn.GRU: QuantizedGRU,
    nn.LSTM: QuantizedLSTM,
}
