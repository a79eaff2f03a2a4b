"""Compilers and exporters: torch.compile, torch.export, AOTInductor, torch.fx, torch.jit."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo
from cases import CELLS, make_pair, random_state, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn

# Everything but code generation: Dynamo, the fake kernels, the joint graph of forward and backward.
GRAPHS = "aot_eager"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Tagger(nn.Module):
    """Our layers where users have them: in a list, in a container, between other layers."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.stack = nn.ModuleList(
            [
                fusedrnn.LSTM(5, 6, 2, bidirectional=True, **options),
                fusedrnn.GRU(12, 4, 2, **options),
            ]
        )
        self.tag = nn.Sequential(nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x, lengths=None):
        x = self.embed(x)
        for layer in self.stack:
            x, _ = layer(x, lengths=lengths)
        return self.tag(x)


def ops_of(graph):
    return [str(node.target) for node in graph.nodes if "fusedrnn" in str(node.target)]


def same_training(module, compiled, *args, **kwargs):
    """Outputs and gradients of a compiled module are those of the module, and inference too."""
    losses, outputs = [], []
    for call in (compiled, module):
        torch.manual_seed(5)
        y = call(*args, **kwargs)
        outputs.append(y)
        losses.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    torch.testing.assert_close(outputs[0], outputs[1])
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(*args, **kwargs), outputs[1])


# torch.compile


class Kept:
    """A backend that keeps the graphs it was given and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(module.graph)
        return module.forward


@pytest.mark.parametrize("kind", ["plain", "lengths", "dropout"])
def test_a_model_is_one_graph(kind):
    """Nothing is configured; the stack is one op in it, not a loop over steps."""
    model = Tagger(dropout=0.5 if kind == "dropout" else 0.0)
    model = model if kind == "dropout" else model.eval()
    x, lengths = torch.randn(7, 3, 3), torch.tensor([4, 0, 7]) if kind == "lengths" else None
    backend = Kept()
    torch.compile(model, fullgraph=True, backend=backend)(x, lengths)
    # Plain calls take the op of few arguments.
    op = "infer" if kind == "plain" else "forward"
    assert [ops_of(graph) for graph in backend.graphs] == [[f"fusedrnn.{op}.default"] * 2]
    if kind != "dropout":
        torch._dynamo.reset()
        same_training(model, torch.compile(model, fullgraph=True, backend=GRAPHS), x, lengths)


KINDS = ["time first", "unbatched", "packed", "unsorted"]


@pytest.mark.parametrize(
    ("cell", "kind", "states"),
    [(cell, "unsorted", True) for cell in CELLS if cell != "lstm"]
    + [("lstm", kind, states) for kind in KINDS for states in (False, True)],
)
def test_layers_alone(cell, kind, states):
    _, fused = make_pair(cell, 3, 4, num_layers=2, bidirectional=True)
    x, hx = torch.randn(5, 3, 3), random_state(fused, 3) if states else None
    if kind == "unbatched":
        x, hx = x[:, 0], hx and tuple(s[:, 0] for s in hx)
    elif kind == "packed":
        x = pack_padded_sequence(x, [5, 3, 2])
    elif kind == "unsorted":
        x = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    expected = run(fused, x, hx)
    fused.compile(fullgraph=True, backend=GRAPHS)
    for name, value in run(fused, x, hx).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_dropout_under_compile_draws_the_same_masks():
    model = Tagger(dropout=0.5)
    same_training(model, torch.compile(model, fullgraph=True, backend=GRAPHS), torch.ones(7, 3, 3))


@pytest.mark.parametrize("dynamic", [None, True])
def test_lengths_and_batches_do_not_recompile(dynamic):
    """The first change of a size makes it dynamic; after it, no size compiles again."""
    model, backend = Tagger(batch_first=True), CompileCounterWithBackend(GRAPHS)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    compiles = []
    for batch, steps in ((4, 7), (5, 9), (6, 11), (8, 30), (2, 13)):
        x = torch.randn(batch, steps, 3)
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        y.sum().backward()
        compiles.append(backend.frame_count)
    first = 0 if dynamic else 1
    assert compiles[first:] == compiles[-1:] * (5 - first)


def test_autocast_under_compile():
    model, x = Tagger(), torch.randn(7, 3, 3)
    compiled = torch.compile(model, fullgraph=True, backend=GRAPHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = model(x), compiled(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_parametrized_weights_under_compile():
    layer, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend=GRAPHS)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x)[0])
    y.sum().backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad.abs().max() > 0


def test_single_steps_under_compile():
    cell, x = fusedrnn.LSTMCell(3, 4), torch.randn(4, 2, 3)

    def loop(x):
        state = None
        for step in x:
            state = cell(step, state)
        return state[0]

    found = torch.compile(loop, fullgraph=True, backend=GRAPHS)(x)
    torch.testing.assert_close(found, loop(x))


def test_transforms_under_compile():
    layer, x = fusedrnn.GRU(3, 4), torch.randn(4, 5, 2, 3)

    def each(x):
        return vmap(lambda one: layer(one)[0])(x)

    torch.testing.assert_close(torch.compile(each, fullgraph=True, backend=GRAPHS)(x), each(x))


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_packing_inside_breaks_the_graph_and_no_more():
    """Eager mode runs the op behind the break, where dynamo still looks at functions of Python."""
    model = fusedrnn.LSTM(3, 4, 2, bidirectional=True)

    def tag(x):
        y, _ = model(pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False))
        return pad_packed_sequence(y)[0]

    tag.parameters = model.parameters
    same_training(tag, torch.compile(tag, backend=GRAPHS), torch.randn(5, 3, 3))


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_backward_inside_breaks_the_graph_and_no_more():
    model, x = fusedrnn.GRU(3, 4, 2), torch.randn(5, 3, 3)

    def step():
        model(x)[0].square().sum().backward()

    step()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.compile(step, backend="eager")()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_torchs_own_layers_are_treated_as_ever():
    """torch refuses its own layers, before and after one of ours was compiled."""
    model = nn.ModuleList([fusedrnn.GRU(3, 4), nn.LSTM(4, 2)])

    def both(x):
        return model[1](model[0](x)[0])[0]

    for _ in range(2):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, (or|and) LSTM"):
            torch.compile(both, fullgraph=True, backend=GRAPHS)(torch.randn(5, 2, 3))
        assert torch._dynamo.config.allow_rnn is False
        torch.compile(model[0], fullgraph=True, backend=GRAPHS)(torch.randn(5, 2, 3))
        assert torch._dynamo.config.allow_rnn is False


def test_a_swapped_model_is_compiled_anew():
    model = nn.Sequential(nn.LSTM(3, 4))
    compiled = torch.compile(model, backend=Kept())
    x = torch.randn(5, 2, 3)
    before = compiled(x)[0]
    fusedrnn.swap(model)
    backend = Kept()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x)[0], before)
    assert ops_of(backend.graphs[0]) == ["fusedrnn.infer.default"]
    torch.testing.assert_close(compiled(x)[0], before)


@pytest.mark.parametrize("first", ["torch._dynamo", "fusedrnn"])
def test_order_of_imports(first):
    code = f"""
        import sys, torch
        import {first}
        import fusedrnn
        print("torch._dynamo" in sys.modules)
        layer = torch.compile(fusedrnn.GRU(2, 3), fullgraph=True, backend="eager")
        print(layer(torch.ones(4, 1, 2))[0].shape)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [str(first != "fusedrnn"), "torch.Size([4, 1, 3])"]


@pytest.mark.slow
def test_generated_code():
    """Inductor's own kernels around ours, with dynamic sizes."""
    model = Tagger()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for steps, batch in ((7, 3), (12, 5)):
        same_training(model, compiled, torch.randn(steps, batch, 3))


@pytest.mark.slow
def test_generated_code_of_packed_input():
    layer = fusedrnn.LSTM(3, 4, 2)
    x = pack_padded_sequence(torch.randn(5, 3, 3), [2, 5, 3], enforce_sorted=False)
    expected = run(layer, x, None)
    layer.compile(fullgraph=True)
    for name, value in run(layer, x, None).items():
        torch.testing.assert_close(value, expected[name], msg=name)


# Activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_activation_checkpointing(cell, reentrant):
    """Dropout draws the same mask again."""
    _, fused = make_pair(cell, 3, 4, num_layers=2, dropout=0.4)
    results = []
    for through in (lambda x: fused(x), lambda x: checkpoint(fused, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        fused.zero_grad()
        x = torch.ones(5, 2, 3, requires_grad=True)
        y, _ = through(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in fused.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_activation_checkpointing_under_compile():
    model, x = Tagger(), torch.randn(7, 3, 3)

    def through(x):
        return checkpoint(model, x, use_reentrant=False)

    y = torch.compile(through, fullgraph=True, backend=GRAPHS)(x)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# torch.export

DYNAMIC = {0: Dim("T", min=1, max=100_000), 1: Dim("B", min=1, max=4096)}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_time_and_batch(strict, mode, tmp_path):
    model = Tagger().train(mode == "train")
    program = torch.export.export(
        model,
        (torch.randn(7, 3, 3),),
        dynamic_shapes={"x": DYNAMIC},
        strict=strict,
    )
    assert ops_of(program.graph) == ["fusedrnn.infer.default"] * 2
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for steps, batch in ((7, 3), (1, 1), (30, 5)):
        x = torch.randn(steps, batch, 3)
        torch.testing.assert_close(loaded(x), model(x))


def test_export_with_lengths():
    model, B = Tagger(), Dim("B", min=1, max=4096)
    given = (torch.randn(7, 3, 3), torch.tensor([4, 0, 7]))
    shapes = {"x": {0: DYNAMIC[0], 1: B}, "lengths": {0: B}}
    program = torch.export.export(model, given, dynamic_shapes=shapes).run_decompositions()
    x, lengths = torch.randn(9, 2, 3), torch.tensor([9, 1])
    torch.testing.assert_close(program.module()(x, lengths), model(x, lengths))


@pytest.mark.parametrize("cell", CELLS)
def test_exported_programs_with_all_states_are_saved(cell, tmp_path):
    layer, x = make_pair(cell, 3, 4, num_layers=2)[1], torch.randn(7, 3, 3)
    program = torch.export.export(layer, (x,), {"return_all": True})
    torch.export.save(program, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(x, return_all=True)
    torch.testing.assert_close(found, layer(x, return_all=True))
    assert found[2]._fields == ("h", "c")


@pytest.mark.slow
def test_package_of_generated_code(tmp_path):
    """AOTInductor: a package that a process which imports fusedrnn loads and runs."""
    model = Tagger().eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(7, 3, 3),), dynamic_shapes={"x": DYNAMIC})
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        x = torch.randn(19, 5, 3)
        torch.save({"x": x, "y": model(x)}, tmp_path / "expected.pt")
    code = f"""
        import torch, fusedrnn
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        model = torch._inductor.aoti_load_package({path!r})
        torch.testing.assert_close(model(expected["x"]), expected["y"])
        (flat,) = model.loader.run([expected["x"]])  # docs/deployment.md
        torch.testing.assert_close(flat, expected["y"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# torch.fx


def test_fx_keeps_layers_as_leaves():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.cell = nn.GRU(3, 4), nn.LSTMCell(4, 4)
            self.lstm = nn.LSTM(4, 2)

        def forward(self, x):
            y, h = self.gru(x)
            return self.lstm(y, None)[0] + self.cell(h[0])[0].sum()

    model, x = Model(), torch.randn(5, 2, 3)
    expected = model(x)
    graphs = [torch.fx.symbolic_trace(m) for m in (model, fusedrnn.swap(model).model)]
    nodes = [[(n.op, str(n.target)) for n in graph.graph.nodes] for graph in graphs]
    assert nodes[1] == nodes[0]
    assert type(graphs[1].gru) is fusedrnn.GRU
    torch.testing.assert_close(graphs[1](x), expected)
    traced_first = fusedrnn.swap(graphs[0]).model
    assert type(traced_first.lstm) is fusedrnn.LSTM
    torch.testing.assert_close(traced_first(x), expected)


def test_fx_with_lengths():
    layer, x, lengths = fusedrnn.RNN(3, 4), torch.randn(5, 2, 3), torch.tensor([5, 2])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, lengths):
            return self.layer(x, lengths=lengths)[0]

    graph = torch.fx.symbolic_trace(Model())
    torch.testing.assert_close(graph(x, lengths), layer(x, lengths=lengths)[0])


class Doubled(fusedrnn.GRU):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_subclasses_of_ours_are_no_leaves():
    """Recorded as a leaf inside its own forward, a subclass would run that forward twice."""
    model = nn.Sequential(Doubled(3, 4))
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=GRAPHS)(x), model(x))
    with pytest.raises(Exception, match="keyword-only|not supported|Unknown|super"):
        torch.jit.script(model)


# torch.jit


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_script_takes_torchs_layer(name, tmp_path):
    model = nn.Sequential(getattr(fusedrnn, name)(3, 4))
    x = torch.randn(5, 3) if "Cell" in name else torch.randn(5, 2, 3)
    expected, weight = model(x), model[0].weight_hh if "Cell" in name else model[0].weight_hh_l0
    with pytest.warns(UserWarning, match=f"puts torch.nn.{name} in the place of fusedrnn's"):
        scripted = torch.jit.script(model)
    torch.jit.save(scripted, tmp_path / "model.pt")
    for found in (scripted(x), torch.jit.load(tmp_path / "model.pt")(x)):
        torch.testing.assert_close(found, expected)
    assert type(model[0]) is getattr(nn, name)  # as the warning says
    assert type(fusedrnn.swap(model).model[0]) is getattr(fusedrnn, name)
    assert any(p is weight for p in model.parameters())
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_records_torchs_operators(tmp_path):
    model = Tagger()
    traced = torch.jit.trace(model, torch.randn(7, 3, 3))
    torch.jit.save(traced, tmp_path / "model.pt")
    x = torch.randn(9, 2, 3)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(x), model(x))
