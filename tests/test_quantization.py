"""quantize and dequantize: results, accuracy, checkpoints, what they refuse, compilers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import CELLS, make_pair, random_state
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from benchmarks import quantization as judge
from fusedrnn import quantized

KINDS = ("int8", "bfloat16")
# Of a product with the weights as they were rounded: digits have 16 bits, and bfloat16 factors on
# processors that multiply them 8.
LOSS = {"int8": 1e-4, "bfloat16": 4e-3}
# input_size, hidden_size, T, B
SHAPES = [(5, 33, 7, 3), (70, 17, 5, 1), (33, 257, 3, 9), (1, 1, 4, 40), (3, 64, 6, 18)]


def make(cell="lstm", kind="int8", sizes=(5, 33), **options):
    """A quantized layer in eval mode, and torch.nn's in float64 with its rounded weights."""
    plain, fused = make_pair(cell, *sizes, **{"num_layers": 2, **options})
    made = fusedrnn.quantize(fused.eval(), kind).model
    exact = copy.deepcopy(plain).double()
    exact.load_state_dict(fusedrnn.dequantize(copy.deepcopy(made)).model.state_dict())
    return made, exact.eval()


def states_of(layer, batch):
    states = random_state(fusedrnn.dequantize(copy.deepcopy(layer)).model, batch)
    return states if layer.mode == "LSTM" else states[0]


def double(states):
    return tuple(s.double() for s in states) if isinstance(states, tuple) else states.double()


def flat(results):
    y, states = results
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return (y, *(states if isinstance(states, tuple) else (states,)))


def assert_near(found, exact, loss):
    for a, b in zip(flat(found), flat(exact), strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32 and not a.requires_grad
        error = judge.relative_error(a, b.detach())
        assert error <= loss, error


def check_shapes(shapes=SHAPES):
    """All cells and kinds in the variant in use: test_variants.py runs this too."""
    for kind in KINDS:
        for cell in CELLS:
            for width, hidden, steps, batch in shapes:
                layer, exact = make(cell, kind, (width, hidden), bidirectional=True)
                x, hx = torch.randn(steps, batch, width), states_of(layer, batch)
                assert_near(layer(x, hx), exact(x.double(), double(hx)), LOSS[kind])


def test_results_are_those_of_the_rounded_weights():
    check_shapes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["relu", "gru", "lstm-proj"])
def test_without_bias_and_with_the_batch_first(cell, kind):
    layer, exact = make(cell, kind, (6, 20), bias=False, batch_first=True)
    x = torch.randn(3, 5, 6)
    assert_near(layer(x), exact(x.double()), LOSS[kind])
    y, _ = layer(x[0])  # unbatched
    assert torch.equal(y, layer(x[:1])[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_packed_sequences(kind):
    layer, exact = make("lstm", kind, bidirectional=True)
    x, hx, lengths = torch.randn(7, 4, 5), states_of(layer, 4), torch.tensor([3, 7, 1, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    wide = pack_padded_sequence(x.double(), lengths, enforce_sorted=False)
    expected = exact(wide, double(hx))
    assert_near(layer(packed, hx), expected, LOSS[kind])
    expected = nn.utils.rnn.pad_packed_sequence(expected[0], total_length=7)[0], expected[1]
    assert_near(layer(x, hx, lengths=lengths), expected, LOSS[kind])
    assert_near(layer(x, hx, lengths=[3, 7, 1, 5]), expected, LOSS[kind])


@pytest.mark.parametrize("form", ["plain", "unbatched", "packed", "lengths"])
def test_the_default_dtype_changes_nothing(form):
    layer, _ = make()
    x, options = torch.randn(4, 3, 5), {}
    if form == "unbatched":
        x = x[:, 0]
    elif form == "packed":
        x = pack_padded_sequence(x, [4, 2, 1])
    elif form == "lengths":
        options["lengths"] = [4, 2, 1]
    expected = layer(x, **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(layer(x, **options), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_integers_for_one_hot_vectors(cell, kind):
    layer, exact = make(cell, kind, (11, 20))
    tokens = torch.randint(11, (6, 3))
    hot = nn.functional.one_hot(tokens, 11).double()
    assert_near(layer(tokens), exact(hot), LOSS[kind])
    packed = pack_padded_sequence(tokens, torch.tensor([6, 4, 1]))
    wide = pack_padded_sequence(hot, torch.tensor([6, 4, 1]))
    assert_near(layer(packed), exact(wide), LOSS[kind])
    with pytest.raises(IndexError, match="index 11 is out of range"):
        layer(tokens + 11 - tokens)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [511, 512, 513, 1029, 8192, 8193])
def test_the_largest_sums_do_not_overflow(size, sign):
    """Every factor and every weight is the largest of its row."""
    plain = nn.RNN(size, 5, nonlinearity="relu", bias=False).eval()
    nn.init.constant_(plain.weight_ih_l0, 0.25 * sign)
    nn.init.zeros_(plain.weight_hh_l0)
    layer = fusedrnn.quantize(copy.deepcopy(plain)).model
    for rows in (1, 5):
        x = torch.full((2, rows, size), float(sign))
        torch.testing.assert_close(layer(x)[0], plain(x)[0], rtol=1e-3, atol=0)


def test_threads_do_not_change_the_result():
    layer, _ = make("lstm", sizes=(70, 96))
    x = torch.randn(6, 40, 70)
    y = layer(x)[0]
    torch.set_num_threads(3)
    assert torch.equal(layer(x)[0], y)


def test_rows_do_not_change_the_result_of_integers():
    layer, _ = make("lstm", sizes=(70, 96))
    x = torch.randn(6, 40, 70)
    if "products of integers" not in fusedrnn.explain(layer, x):
        pytest.skip("the kernels avx2, avx512bf16 and amx multiply integers, whose sums are exact")
    y, (h, c) = layer(x)
    for rows in (slice(0, 1), slice(3, 8), slice(10, 27), slice(0, 33)):
        part, (h_part, c_part) = layer(x[:, rows])
        assert torch.equal(part, y[:, rows])
        assert torch.equal(h_part, h[:, rows]) and torch.equal(c_part, c[:, rows])
    torch.set_num_threads(3)
    assert torch.equal(layer(x[:, :1])[0], y[:, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_inputs(kind):
    layer, exact = make("lstm", kind, (20, 33))
    for scale in (0.0, 1e-42, 1e-30, 1e4, 1e30):
        x = torch.randn(3, 2, 20) * scale
        assert_near(layer(x), exact(x.double()), LOSS[kind])
    x = torch.randn(1, 4, 20)
    clean = layer(x)[0]
    x[0, 1, 3], x[0, 2, 5] = torch.nan, torch.inf
    y = layer(x)[0]
    assert torch.equal(y[:, [0, 3]], clean[:, [0, 3]])
    assert y[:, 1].isnan().all()
    expected = exact(x.double())[0][:, 2]
    assert torch.allclose(y[:, 2].double(), expected, atol=0.02, equal_nan=True)


def test_weights_of_any_size():
    for scale in (0.0, 1e-38, 1e-20, 1e10):
        layer = nn.LSTM(4, 5).eval()
        with torch.no_grad():
            layer.weight_hh_l0[2].fill_(0)
            layer.weight_ih_l0.mul_(scale)
        before = copy.deepcopy(layer.state_dict())
        fusedrnn.quantize(layer)
        assert torch.isfinite(layer(torch.randn(2, 3, 4))[0]).all()
        fusedrnn.dequantize(layer)
        for name, weight in before.items():
            assert (layer.state_dict()[name] - weight).abs().max() <= weight.abs().max() / 250


# The rule for accuracy


@pytest.mark.parametrize(
    "shape",
    [judge.Shape(c, i, 128, 2, 35, 32) for c in ("LSTM", "GRU") for i in (28, 128)],
    ids=str,
)
def test_a_quarter_of_the_error_of_torch_int8(shape):
    found = judge.errors(shape, draws=1)
    assert found["quantized int8"] <= found[judge.TORCH_INT8] / 4
    assert found["quantized bfloat16"] <= found[judge.TORCH_INT8] / 4
    assert found["fusedrnn"] <= found["quantized int8"] / 100  # it is the rounding that counts


# State


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm-proj"])
def test_dequantize_undoes_it(cell, kind):
    plain, _ = make_pair(cell, 5, 33, num_layers=2, bidirectional=True)
    layer, before = copy.deepcopy(plain).eval(), plain.state_dict()
    fusedrnn.quantize(layer, kind)
    assert not list(layer.parameters())
    report = fusedrnn.dequantize(layer)
    assert type(layer) is getattr(fusedrnn, type(plain).__name__)
    assert str(report.layers[0]).endswith(
        f"Quantized{type(plain).__name__} -> {report.layers[0].after}"
    )
    assert list(layer.state_dict()) == list(before)
    for name, weight in layer.state_dict().items():
        if name.startswith("bias"):
            assert torch.equal(weight, before[name])
        else:
            step = before[name].abs().amax(1, keepdim=True) / (127 if kind == "int8" else 128)
            assert ((weight - before[name]).abs() <= step * 0.501).all()
    # Rounded weights are kept as they are, and the layer is an ordinary one.
    fusedrnn.quantize(layer, kind)
    again = fusedrnn.dequantize(copy.deepcopy(layer)).model.state_dict()
    fusedrnn.dequantize(layer).model.train()
    for name, weight in layer.state_dict().items():
        assert torch.allclose(again[name], weight, rtol=1e-6)
    y, _ = layer(torch.randn(3, 2, 5))
    y.sum().backward()
    fusedrnn.unswap(layer)
    assert type(layer) is type(plain)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rnn = nn.LSTM(6, 10, 2, bidirectional=True, batch_first=True)
        self.tag = nn.Linear(20, 3)

    def forward(self, tokens):
        return self.tag(self.rnn(self.embed(tokens))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints(kind):
    model, tokens = Tagger().eval(), torch.randint(11, (3, 5))
    fusedrnn.quantize(model, kind)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert f"rnn.weight_ih_l0_{kind}" in saved and "rnn.weight_ih_l0" not in saved
    fresh = Tagger().eval()
    fusedrnn.quantize(fresh, kind)
    assert not torch.equal(fresh(tokens), model(tokens))
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(tokens), model(tokens))


def test_checkpoints_of_another_kind():
    model = fusedrnn.quantize(Tagger().eval()).model
    other = fusedrnn.quantize(Tagger().eval(), "bfloat16").model
    with pytest.raises(RuntimeError, match="rnn has weights in int8, .* in float32: load it into"):
        model.load_state_dict(Tagger().state_dict())
    with pytest.raises(RuntimeError, match='in bfloat16: .*weights="bfloat16"'):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Tagger().load_state_dict(model.state_dict())


def test_the_report():
    model = nn.ModuleDict(
        {
            "a": nn.LSTM(3, 4),
            "b": fusedrnn.GRU(3, 4),
            "cell": nn.LSTMCell(3, 4),
            "norm": fusedrnn.LSTM(3, 4, layer_norm=True),
            "wide": nn.RNN(3, 4).double(),
            "sub": type("Mine", (nn.GRU,), {})(3, 4),
            "linear": nn.Linear(3, 4),
        }
    ).eval()
    report = fusedrnn.quantize(model)
    assert report.model is model
    assert {str(line) for line in report.changed} == {
        "a: torch.nn.LSTM -> fusedrnn.quantized.QuantizedLSTM",
        "b: fusedrnn.GRU -> fusedrnn.quantized.QuantizedGRU",
    }
    assert {line.name for line in report.left} == {"cell", "norm", "wide", "sub"}
    assert "model.float()" in str(report)
    assert repr(model["a"]) == "fusedrnn.QuantizedLSTM(3, 4, weights=int8)"
    assert isinstance(model["a"], quantized.QuantizedLSTM)
    assert "quantized already" in str(fusedrnn.quantize(model))
    assert "fusedrnn.dequantize it first" in str(fusedrnn.quantize(model, "bfloat16"))
    assert "dequantize undoes that" in str(fusedrnn.swap(model))
    text = fusedrnn.explain(model["a"], torch.randn(2, 1, 3))
    assert "products of integers" in text or "widened" in text
    assert "backward" not in text


def test_layers_quantized_by_torch_are_left():
    layer = judge.torch_int8(nn.LSTM(3, 4))
    report = fusedrnn.quantize(nn.Sequential(layer).eval())
    assert "quantize the float model in its place" in str(report)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", ["weight_norm", "prune"])
def test_layers_whose_weights_are_computed_before_each_call_are_left(change):
    """What weight_norm made of one checkpoint is there until a call after another was loaded."""
    layer = nn.LSTM(3, 4).eval()
    if change == "prune":
        prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
    else:
        nn.utils.weight_norm(layer, "weight_hh_l0")
    report = fusedrnn.quantize(nn.Sequential(layer))
    assert "its weight_hh_l0 is no parameter" in str(report)
    assert type(layer) is nn.LSTM
    if change == "prune":
        prune.remove(layer, "weight_hh_l0")
    else:
        nn.utils.remove_weight_norm(layer, "weight_hh_l0")
    x, expected = torch.randn(5, 2, 3), layer.weight_hh_l0.detach().clone()
    assert fusedrnn.quantize(layer).changed
    layer(x)
    fusedrnn.dequantize(layer)
    torch.testing.assert_close(layer.weight_hh_l0, expected, atol=1e-2, rtol=0)


# What is refused


def test_arguments():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        fusedrnn.quantize(3)
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        fusedrnn.dequantize(3)
    with pytest.raises(ValueError, match="expected weights="):
        fusedrnn.quantize(nn.LSTM(3, 4).eval(), "int4")
    with pytest.raises(TypeError, match=r"make a fusedrnn.LSTM"):
        quantized.QuantizedLSTM(3, 4)


def test_nothing_changes_where_a_layer_is_refused():
    model = nn.ModuleList([nn.LSTM(3, 4).eval(), nn.GRU(3, 4)])
    with pytest.raises(RuntimeError, match=r"1 is in training mode"):
        fusedrnn.quantize(model)
    assert type(model[0]) is nn.LSTM
    with torch.no_grad():
        model.eval()[1].weight_hh_l0[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1.weight_hh_l0 has values that are infinite or NaN"):
        fusedrnn.quantize(model)
    assert type(model[0]) is nn.LSTM
    with pytest.raises(RuntimeError, match="0.weight_ih_l0 is on meta"):
        fusedrnn.quantize(model.to("meta"))


def test_calls_in_training_mode():
    model, tokens = fusedrnn.quantize(Tagger().eval()).model, torch.randint(11, (3, 5))
    model.train()
    with pytest.raises(RuntimeError, match=r"QuantizedLSTM has quantized weights, .* model.eval"):
        model(tokens)
    y = model.eval()(tokens)  # the layers around it may be trained
    assert y.requires_grad
    y.sum().backward()


def test_moves_and_conversions():
    layer, _ = make()
    for call in (layer.half, layer.double, layer.bfloat16):
        with pytest.raises(RuntimeError, match="computes in float32, and cannot be converted"):
            call()
    assert layer.float().cpu() is layer
    layer(torch.randn(2, 3, 5))
    with FakeTensorMode():
        gpu = torch.empty(2, 3, 5, device="cuda")
        with pytest.raises(RuntimeError, match="cannot be moved to cuda"):
            layer._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        with pytest.raises(RuntimeError, match="runs on the CPU, got a tensor on cuda"):
            layer(gpu)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_calls():
    layer, _ = make()
    plain = nn.LSTM(5, 33, 2)
    for args in (
        (torch.randn(2, 3, 4),),
        (torch.randn(2, 3, 5, 1),),
        (torch.randn(0, 3, 5),),
        (torch.randn(2, 3, 5).double(),),
        (torch.randn(2, 3, 5), (torch.zeros(2, 4, 33), torch.zeros(2, 3, 33))),
        (torch.randn(2, 3, 5), (torch.zeros(2, 33), torch.zeros(2, 33))),
    ):
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            plain(*args)
        with pytest.raises(type(theirs.value)) as ours:
            layer(*args)
        expected = str(theirs.value).replace("LSTM:", "QuantizedLSTM:")
        assert str(ours.value) == expected
    with pytest.raises(RuntimeError, match="jit.script knows no QuantizedLSTM: torch.export takes"):
        torch.jit.script(layer)
    with pytest.raises(RuntimeError, match="jit.trace knows no QuantizedLSTM: torch.export takes"):
        torch.jit.trace(layer, torch.randn(2, 3, 5))


def test_the_op_refuses_wrong_weights():
    layer, _ = make("gru", num_layers=1)
    x, weights, rest = torch.randn(2, 3, 5), layer._stored_weights(), list(layer._rest())
    run = torch.ops.fusedrnn.infer_quantized
    run(x, None, None, weights, *rest)
    wrong = [weights[0].float(), *weights[1:]]
    for args, text in (
        ((x, None, None, wrong, *rest), "not in the format"),
        ((x, None, None, weights[:-1], *rest), "weights, got 5"),
        ((x, None, None, [weights[0][:, :-64], *weights[1:]], *rest), "of shape"),
        ((x.double(), None, None, weights, *rest), "take float32 input, got float64"),
        ((x, None, None, weights, *rest[:-2], 6, "int8"), "input of size 6, got 5"),
        ((x, None, None, weights, *rest[:-1], "int4"), "expected weights in int8 or bfloat16"),
        ((x, None, None, weights, *rest[:-1], ""), "expected weights in int8 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=text):
            run(*args)


def test_autocast():
    layer, _ = make()
    x = torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())[0]
    assert torch.equal(y, layer(x.bfloat16().float())[0])


# Compilers


def test_opcheck():
    for cell in ("gru", "lstm"):
        layer, _ = make(cell)
        args = (torch.randn(4, 3, 5), None, None, layer._stored_weights(), *layer._rest())
        torch.library.opcheck(torch.ops.fusedrnn.infer_quantized, args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_func_is_refused():
    layer = fusedrnn.quantize(nn.GRU(3, 4).eval()).model
    x = torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match=r"torch.func does not take: call fusedrnn.dequantize"):
        torch.vmap(lambda row: layer(row)[0])(x[:, None])


def test_explain_raises_what_an_ensemble_s_call_would():
    layer, x = (
        fusedrnn.quantize(nn.Sequential(fusedrnn.GRU(3, 4)).eval()).model[0],
        torch.zeros(5, 2, 3),
    )
    texts = []
    for call in (
        lambda: torch.vmap(layer)(x.unsqueeze(0)),
        lambda: fusedrnn.explain(layer, x, members=2),
    ):
        with pytest.raises(RuntimeError, match="torch.func does not take") as caught:
            call()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_explain_raises_what_the_call_would():
    layer, x = fusedrnn.quantize(nn.GRU(3, 4).eval()).model, torch.randn(5, 2, 3)
    with pytest.raises(TypeError, match="QuantizedGRU takes no resets"):
        fusedrnn.explain(layer, x, resets=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="QuantizedGRU takes no return_all"):
        fusedrnn.explain(layer, x, return_all=True)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fusedrnn.explain(layer.train(), x)


def test_compile_and_export():
    model, tokens = fusedrnn.quantize(Tagger().eval()).model, torch.randint(11, (3, 5))
    expected = model(tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(tokens), expected)
    batch, steps = torch.export.Dim("batch", max=64), torch.export.Dim("steps", max=64)
    program = torch.export.export(
        model, (tokens,), dynamic_shapes=({0: batch, 1: steps},), strict=False
    )
    assert any("infer_quantized" in str(n.target) for n in program.graph.nodes)
    assert torch.equal(program.module()(tokens), expected)
    more = torch.randint(11, (6, 9))
    assert torch.equal(program.module()(more), model(more))


def test_fx_keeps_the_layer():
    model, tokens = fusedrnn.quantize(Tagger().eval()).model, torch.randint(11, (3, 5))
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(tokens), model(tokens))
