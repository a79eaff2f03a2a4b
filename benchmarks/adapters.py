"""Other implementations as modules with the call of torch.nn's layers: x -> output, state.

T steps, B rows of the batch, D directions, H hidden units, L layers.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

State = Tensor | tuple[Tensor, ...]


def copied(layer: nn.RNNBase) -> nn.RNNBase:
    """A copy with contiguous weights; cuDNN would gather others at every call."""
    made = copy.deepcopy(layer)
    made.flatten_parameters()
    return made


class _SameWeights(nn.Module):
    """A module whose parameters are copies of the layer's with the same names."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.bidirectional, self.num_layers = layer.bidirectional, layer.num_layers
        self.hidden_size, self.lstm = layer.hidden_size, isinstance(layer, nn.LSTM)
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))


class CellLoop(_SameWeights):
    """torch.nn's cells in a hand-written loop over the steps."""

    def __init__(self, layer: nn.RNNBase, example: object) -> None:
        super().__init__(layer)
        kind = getattr(nn, f"{type(layer).__name__}Cell")
        self.cells = nn.ModuleList()
        for k in range(layer.num_layers):
            for end in ("", "_reverse")[: 1 + layer.bidirectional]:
                cell = kind(1, layer.hidden_size)
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    setattr(cell, name, getattr(self, f"{name}_l{k}{end}"))
                cell.input_size = cell.weight_ih.shape[1]
                self.cells.append(cell)

    def forward(self, x: Tensor) -> tuple[Tensor, State]:
        directions = 1 + self.bidirectional
        finals: list[tuple[Tensor, ...]] = []
        for k in range(self.num_layers):
            sides = []
            for d in range(directions):
                cell = self.cells[k * directions + d]
                zeros = x.new_zeros(x.shape[1], self.hidden_size)
                state: Any = (zeros, zeros) if self.lstm else zeros
                outputs = []
                for step in x.flip(0) if d else x:
                    state = cell(step, state)
                    outputs.append(state[0] if self.lstm else state)
                side = torch.stack(outputs)
                sides.append(side.flip(0) if d else side)
                finals.append(state if self.lstm else (state,))
            x = torch.cat(sides, -1) if directions == 2 else sides[0]
        states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return x, states if self.lstm else states[0]


def compiled(layer: nn.RNNBase, example: object) -> nn.Module:
    """torch.nn's layer through torch.compile, which ignores it outside of ``compiling``."""
    from torch import _dynamo  # here, as it takes a second

    _dynamo.reset()  # earlier shapes would make this one dynamic
    made = copied(layer)
    made.compile()
    return made


def compiling() -> AbstractContextManager[Any]:
    """Lets torch.compile compile recurrent layers."""
    from torch import _dynamo

    patch: AbstractContextManager[Any] = _dynamo.config.patch(allow_rnn=True)
    return patch


def _in_onnx(layer: nn.RNNBase, example: object) -> bytes:
    """A file of ONNX with torch.nn's layer as one node, and an input x of the example's shape."""
    model: Any = io.BytesIO()
    was_training = layer.training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the batch is fixed; the exporter is old
        # The newer exporter unrolls the steps.
        torch.onnx.export(layer.eval(), (example,), model, input_names=["x"], dynamo=False)
    layer.train(was_training)
    found: bytes = model.getvalue()
    return found


class OnnxRuntime(nn.Module):
    """torch.nn's layer exported to ONNX, run by ONNX Runtime on the CPU."""

    def __init__(self, layer: nn.RNNBase, example: object) -> None:
        super().__init__()
        import onnxruntime

        self._lstm = isinstance(layer, nn.LSTM)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            _in_onnx(layer, example), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, State]:
        outputs = self._session.run(None, {"x": x.numpy()})
        y, *states = (torch.from_numpy(o) for o in outputs)
        return y, tuple(states) if self._lstm else states[0]


class OpenVino(nn.Module):
    """torch.nn's layer exported to ONNX, run by OpenVINO on the CPU in the layer's dtype."""

    def __init__(self, layer: nn.RNNBase, example: object) -> None:
        super().__init__()
        import openvino

        self._lstm = isinstance(layer, nn.LSTM)
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # on AMX it would compute in bfloat16
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = core.read_model(io.BytesIO(_in_onnx(layer, example)))
        self._request = core.compile_model(model, "CPU", options).create_infer_request()

    def forward(self, x: Tensor) -> tuple[Tensor, State]:
        outputs = self._request.infer([x.numpy()], share_inputs=True)
        y, *states = (torch.from_numpy(outputs[i]) for i in range(len(outputs)))
        return y, tuple(states) if self._lstm else states[0]


def torch_int8(layer: nn.RNNBase, example: object = None) -> nn.Module:
    """torch's dynamic int8 of a layer, which is not an RNN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        model = nn.ModuleList([copy.deepcopy(layer)]).eval()
        torch.ao.quantization.quantize_dynamic(model, {type(layer)}, torch.qint8, inplace=True)
    made: nn.Module = model[0]
    return made


class FlashRNN(_SameWeights):
    """FlashRNN's fused CUDA kernels after the input's product, which they leave to the caller.

    They take gates as (B, T, G, 1, H), the recurrent matrix as (G, 1, H, H) and one bias.
    """

    def __init__(self, layer: nn.RNNBase, example: object, backend: str = "cuda_fused") -> None:
        super().__init__(layer)
        from flashrnn import flashrnn

        logging.getLogger("flashrnn").setLevel(logging.ERROR)
        self._run, self._backend = flashrnn, backend
        self._function = {"RNN": "elman", "GRU": "gru", "LSTM": "lstm"}[type(layer).__name__]

    def forward(self, x: Tensor) -> tuple[Tensor, State]:
        h = self.hidden_size
        weights = dict(self.named_parameters())
        parts = (weights[f"{name}_l0"] for name in ("weight_hh", "bias_ih", "bias_hh"))
        recurrent, b_ih, b_hh = (p.view(-1, h, *p.shape[1:]) for p in parts)
        if self._function == "gru":  # gates: recurrent candidate, r, z, the input's candidate
            recurrent = recurrent[[2, 0, 1]]
            bias = torch.cat((b_hh[2:], b_ih[:2] + b_hh[:2], b_ih[2:]))
        else:
            bias = b_ih + b_hh
        gates = nn.functional.linear(x.transpose(0, 1), weights["weight_ih_l0"])
        states, last = self._run(
            gates.view(*gates.shape[:2], -1, 1, h),
            recurrent[:, None],
            bias[:, None],
            function=self._function,
            backend=self._backend,
            dtype=str(x.dtype).removeprefix("torch."),
        )
        # (S, B, T, 1, H); the last step separately with T = 1
        finals = tuple(s[:, 0].transpose(0, 1) for s in last)
        return states[0, :, :, 0].transpose(0, 1), finals if self.lstm else finals[0]
