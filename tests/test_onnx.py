"""torch.onnx.export's default exporter: standard nodes, in ONNX Runtime and OpenVINO."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn

T, B = Dim("T"), Dim("B")
# The exporter names every operator of packages that are not installed.
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def exported(model, inputs, shapes, path):
    torch.onnx.export(model, inputs, path, dynamic_shapes=shapes, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    return [node.op_type for node in onnx.load(path).graph.node]


def in_onnxruntime(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def in_openvino(model, inputs):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(inputs).values())


def assert_same(found, expected):
    for a, b in zip(found, tree_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=1e-6)


def arrays(inputs):
    return [t.numpy() for t in tree_leaves(inputs) if t is not None]


class Every(nn.Module):
    """Layers of every kind, each with calls that differ."""

    def __init__(self):
        super().__init__()
        self.lstm = fusedrnn.LSTM(3, 5, 2, bidirectional=True)
        self.gru = fusedrnn.GRU(3, 5, 2, bias=False, batch_first=True, dropout=0.3)
        self.rnn = fusedrnn.RNN(3, 4, bidirectional=True)
        self.relu = fusedrnn.RNN(3, 4, nonlinearity="relu")
        self.one = fusedrnn.GRU(3, 4, recurrent_dropout=0.5)
        self.few = fusedrnn.LSTM(7, 4, bidirectional=True)  # one-hot vectors are narrower
        self.many = fusedrnn.GRU(60, 4)  # the gates are

    def forward(self, x, tokens, h, c, lengths):
        return (
            self.lstm(x, (h, c), lengths=lengths),
            self.gru(x.transpose(0, 1)),
            self.rnn(x, h[:2, :, :4], lengths=lengths),
            self.relu(x, return_all=True)[:2],
            self.one(x[:, 0]),
            self.few(torch.where(tokens < 7, tokens, 0), lengths=lengths),
            self.many(tokens),
        )


def inputs_of_every(steps, batch):
    lengths = torch.tensor([steps, 0, 2, 1][:batch])
    tokens = torch.randint(60, (steps, batch))
    return torch.randn(steps, batch, 3), tokens, *torch.randn(2, 4, batch, 5), lengths


class Some(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fusedrnn.LSTM(3, 5, bidirectional=True)
        self.gru = fusedrnn.GRU(60, 4)

    def forward(self, x, tokens, h, c, lengths):
        return self.lstm(x, (h[:2], c[:2]), lengths=lengths), self.gru(tokens)


SHAPES = {"x": {0: T, 1: B}, "tokens": {0: T, 1: B}, "h": {1: B}, "c": {1: B}, "lengths": {0: B}}


def test_layers_in_onnxruntime(tmp_path):
    model, path = Some(), tmp_path / "some.onnx"
    nodes = exported(model, inputs_of_every(5, 3), SHAPES, path)
    assert nodes.count("LSTM") == nodes.count("GRU") == nodes.count("Gather") == 1
    for steps, batch in ((9, 4), (1, 1)):
        inputs = inputs_of_every(steps, batch)
        assert_same(in_onnxruntime(path, arrays(inputs)), model(*inputs))


@pytest.mark.slow
def test_every_layer_in_onnxruntime(tmp_path):
    model, path = Every().eval(), tmp_path / "every.onnx"
    nodes = exported(model, inputs_of_every(5, 3), SHAPES, path)
    assert [n for n in nodes if n in ("LSTM", "GRU", "RNN")] == (
        ["LSTM"] * 2 + ["GRU"] * 2 + ["RNN"] * 2 + ["GRU", "LSTM", "GRU"]
    )
    assert nodes.count("Gather") == 3  # of tokens, and x[:, 0]
    assert not {"Loop", "Scan", "MatMul", "Tanh"} & set(nodes)
    assert set(onnx.load(path).functions) == set()
    for steps, batch in ((9, 2), (1, 1), (5, 4)):
        inputs = inputs_of_every(steps, batch)
        assert_same(in_onnxruntime(path, arrays(inputs)), model(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_layer_alone_in_onnxruntime_and_openvino(name, tmp_path):
    """Of a size at which the exporter leaves it to the runtime to put the weights in order."""
    model, path = getattr(fusedrnn, name)(33, 129, 2, bidirectional=True).eval(), tmp_path / "f"
    nodes = exported(model, (torch.randn(5, 3, 33),), ({0: T, 1: B},), path)
    assert nodes.count(name) == 2
    for steps, batch in ((7, 2), (1, 1)):
        x = torch.randn(steps, batch, 33)
        assert_same(in_onnxruntime(path, [x.numpy()]), model(x))
        assert_same(in_openvino(path, [x.numpy()]), model(x))


class WithLengths(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer = getattr(fusedrnn, name)(3, 4, bidirectional=True)

    def forward(self, x, lengths):
        return self.layer(x, lengths=lengths)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LSTM"])
def test_lengths_in_openvino(name, tmp_path):
    """A file of fixed sizes, and an ExportedProgram for any batch."""
    openvino = pytest.importorskip("openvino")
    model, path = WithLengths(name).eval(), tmp_path / "f.onnx"
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 0, 2])
    exported(model, (x, torch.tensor([1, 2, 3])), None, path)
    assert_same(in_openvino(path, arrays((x, lengths))), model(x, lengths))
    program = torch.export.export(
        model, (x, lengths), dynamic_shapes={"x": {1: B}, "lengths": {0: B}}
    )
    x, lengths = torch.randn(5, 2, 3), torch.tensor([1, 4])
    found = in_openvino(openvino.convert_model(program), arrays((x, lengths)))
    assert_same(found, model(x, lengths))


@pytest.mark.slow
def test_packed_input(tmp_path):
    layer, path = fusedrnn.LSTM(3, 4, 2).eval(), tmp_path / "f.onnx"

    def packed():
        return pack_padded_sequence(torch.randn(5, 3, 3), [2, 5, 3], enforce_sorted=False)

    assert exported(layer, (packed(),), None, path).count("LSTM") == 2
    x = packed()
    (y, *_), states = layer(x)
    found = in_onnxruntime(path, arrays(x))
    assert_same([found[0], *found[-2:]], (y, states))


@pytest.mark.slow
def test_an_exported_program_becomes_a_file(tmp_path):
    model, path = fusedrnn.LSTM(3, 4, batch_first=True).eval(), tmp_path / "f.onnx"
    program = torch.export.export(model, (torch.randn(3, 5, 3),), dynamic_shapes=({0: B, 1: T},))
    assert "LSTM" in exported(program, (), None, path)
    x = torch.randn(2, 7, 3)
    assert_same(in_onnxruntime(path, [x.numpy()]), model(x))


REFUSED = {
    "resets": ({}, {"resets": torch.zeros(5, 3, dtype=torch.bool)}),
    "zoneout": ({"zoneout": 0.1}, {}),
    "layer_norm": ({"layer_norm": True}, {}),
    "proj_size": ({"proj_size": 2}, {}),
    "return_all of an LSTM": ({}, {"return_all": True}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "resets" else pytest.mark.slow) for n in REFUSED]
)
def test_what_onnx_does_not_have_is_named(name):
    options, keywords = REFUSED[name]
    layer = fusedrnn.LSTM(3, 4, **options).eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=f"takes no {name}"):
        torch.onnx.export(layer, (torch.randn(5, 3, 3),), kwargs=keywords, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout"])
def test_dropout_in_training_mode_is_refused(name):
    layer = fusedrnn.LSTM(3, 4, 2, **{name: 0.5})
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=f"takes no {name}.*eval"):
        torch.onnx.export(layer, (torch.randn(5, 3, 3),), verbose=False)


@pytest.mark.filterwarnings("ignore")
def test_the_exporter_of_torchscript(tmp_path):
    """It traces torch.nn's operators, and so has only what torch.nn has."""
    inputs = torch.randn(5, 3, 3), torch.tensor([1, 2, 5])
    with pytest.raises(NotImplementedError, match="lengths.*dynamo=False"):
        torch.onnx.export(WithLengths("GRU"), inputs, tmp_path / "f.onnx", dynamo=False)
    model = nn.Sequential(fusedrnn.GRU(3, 4))
    torch.onnx.export(model, inputs[:1], tmp_path / "f.onnx", dynamo=False)
    assert "GRU" in [node.op_type for node in onnx.load(tmp_path / "f.onnx").graph.node]
