"""swap, unswap, explain and info, on models as people write them."""

import copy
import io
import re

import pytest
import torch
from tolerances import assert_as_exact_as_torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import _C

VOCABULARY = 11


class CharModel(nn.Module):
    """One-hot characters, a stack, an output layer: predicts the next character."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(VOCABULARY, 16, num_layers=2)
        self.out = nn.Linear(16, VOCABULARY)

    def forward(self, text):
        """text (T, B) of integers."""
        y, _ = self.rnn(one_hot(text, VOCABULARY).to(self.out.weight.dtype))
        return self.out(y)

    @staticmethod
    def batch():
        return (torch.randint(VOCABULARY, (12, 5)),)


class Tagger(nn.Module):
    """Embedding, bidirectional GRU with the batch first, a tag for each word."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.rnn = nn.GRU(6, 10, batch_first=True, bidirectional=True)
        self.tag = nn.Linear(20, 4)

    def forward(self, text):
        return self.tag(self.rnn(self.embedding(text))[0])

    @staticmethod
    def batch():
        return (torch.randint(VOCABULARY, (3, 9)),)


class Translator(nn.Module):
    """A packed encoder whose state starts a decoder that is fed one step at a time."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.encoder = nn.LSTM(6, 8, num_layers=2, dropout=0.0)
        self.decoder = nn.LSTM(6, 8, num_layers=2)
        self.bridge = nn.RNNCell(8, 8)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, source, lengths, target):
        packed = pack_padded_sequence(self.embedding(source), lengths, enforce_sorted=False)
        encoded, state = self.encoder(packed)
        padded, _ = pad_packed_sequence(encoded)
        context = self.bridge(padded.mean(0))
        outputs = []
        for step in self.embedding(target):
            y, state = self.decoder(step[None], state)
            outputs.append(self.out(y[0] + context))
        return torch.stack(outputs)

    @staticmethod
    def batch():
        source = torch.randint(VOCABULARY, (7, 4))
        return source, torch.tensor([3, 7, 1, 5]), torch.randint(VOCABULARY, (4, 4))


MODELS = [CharModel, Tagger, Translator]


def results(model, batch):
    """The outputs of `model` and all its gradients."""
    model.zero_grad()
    y = model(*batch)
    goal = torch.arange(y.shape[:-1].numel()).remainder(y.shape[-1])
    cross_entropy(y.flatten(0, -2), goal).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"output": y.detach(), **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", MODELS)
def test_same_outputs_and_gradients(build, dtype):
    model = build().to(dtype)
    batch = build.batch()
    exact = results(copy.deepcopy(model).double(), batch)
    theirs = results(model, batch)
    noise = []
    for seed in range(3):  # see tolerances.py
        moved = copy.deepcopy(model).double()
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in moved.parameters():
                p.mul_(1 + torch.finfo(dtype).eps * (2 * torch.rand_like(p) - 1))
        noise.append(results(moved, batch))
    assert fusedrnn.swap(model).model is model
    ours = results(model, batch)
    assert_as_exact_as_torch(ours, theirs, exact, noise)
    assert fusedrnn.unswap(model).model is model
    again = results(model, batch)
    assert all(torch.equal(again[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("build", MODELS)
def test_only_classes_change(build):
    model = build().eval()
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    layers[0].train()
    parameters = dict(model.named_parameters())
    before = [(m, type(m), dict(vars(m))) for m in model.modules()]
    fusedrnn.swap(model)
    for module, cls, state in before:
        assert vars(module) == state
        if module in layers:
            assert type(module) is getattr(fusedrnn, cls.__name__)
            assert isinstance(module, cls)
        else:
            assert type(module) is cls
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert layers[0].training
    assert not model.training
    fusedrnn.unswap(model)
    assert [type(m) for m in model.modules()] == [cls for _, cls, _ in before]


def test_each_class_is_swapped():
    for name, arguments in {"RNN": (2, 3), "GRU": (2, 3), "LSTM": (2, 3)}.items():
        for suffix in ("", "Cell"):
            plain = getattr(nn, name + suffix)(*arguments)
            fusedrnn.swap(plain)
            assert type(plain) is getattr(fusedrnn, name + suffix)
            fusedrnn.unswap(plain)
            assert type(plain) is getattr(nn, name + suffix)


def test_swap_twice_is_swap_once():
    model = CharModel()
    fusedrnn.swap(model)
    fusedrnn.swap(model)
    assert type(model.rnn) is fusedrnn.LSTM
    fusedrnn.unswap(model)
    fusedrnn.unswap(model)
    assert type(model.rnn) is nn.LSTM


def test_the_optimizer_goes_on():
    """Swapped in the middle of training, Adam's state and all: the losses are torch.nn's."""
    torch.manual_seed(0)
    first = CharModel().double()
    second = copy.deepcopy(first)
    batch = CharModel.batch()
    goal = torch.randint(VOCABULARY, batch[0].shape).flatten()
    losses = []
    for model in (first, second):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses.append([])
        for step in range(12):
            if model is second and step in (4, 8):
                (fusedrnn.swap if step == 4 else fusedrnn.unswap)(model)
            optimizer.zero_grad()
            loss = cross_entropy(model(*batch).flatten(0, 1), goal)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert losses[0][-1] < losses[0][0]


def test_hooks_stay():
    model = CharModel()
    calls = []
    model.rnn.register_forward_hook(lambda *_: calls.append("forward"))
    model.rnn.weight_hh_l0.register_hook(lambda g: calls.append("gradient"))
    fusedrnn.swap(model)
    model(*CharModel.batch()).sum().backward()
    assert calls == ["forward", "gradient"]


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_subclasses_are_left_alone():
    model = nn.Sequential(OwnForward(3, 4), nn.Identity())
    before = model[0](torch.ones(2, 1, 3))[0]
    fusedrnn.swap(model)
    assert type(model[0]) is OwnForward
    assert torch.equal(model[0](torch.ones(2, 1, 3))[0], before)


class OwnFused(fusedrnn.LSTM):
    pass


def test_subclasses_of_ours_are_left_alone():
    assert type(fusedrnn.unswap(OwnFused(3, 4)).model) is OwnFused


def test_nested_and_shared():
    shared = nn.GRU(4, 4)
    model = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.RNN(4, 4), shared, nn.ModuleList([nn.LSTM(4, 4)])]),
            "sequence": nn.Sequential(nn.Linear(4, 4), nn.Sequential(shared, nn.LSTMCell(4, 4))),
        }
    )
    fusedrnn.swap(model)
    assert type(model["list"][0]) is fusedrnn.RNN
    assert type(model["list"][2][0]) is fusedrnn.LSTM
    assert type(model["sequence"][1][1]) is fusedrnn.LSTMCell
    assert model["list"][1] is model["sequence"][1][0] is shared
    assert type(shared) is fusedrnn.GRU


def test_tied_layers_share_their_parameter():
    model = nn.ModuleList([nn.GRU(4, 4), nn.GRU(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    fusedrnn.swap(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    x = torch.randn(3, 2, 4)
    model[1](model[0](x)[0])[0].sum().backward()
    grad = model[0].weight_hh_l0.grad.clone()
    fusedrnn.unswap(model)
    model.zero_grad()
    model[1](model[0](x)[0])[0].sum().backward()
    torch.testing.assert_close(grad, model[0].weight_hh_l0.grad)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_the_model_itself_may_be_a_layer(name):
    model = getattr(nn, name)(3, 4)
    assert fusedrnn.swap(model).model is model
    assert type(model) is getattr(fusedrnn, name)


def test_parametrized_layers():
    """parametrize gives an instance a class of its own: it stays as it is, and works."""
    layer = nn.GRU(3, 4)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    before = layer(x)[0]
    fusedrnn.swap(layer)
    torch.testing.assert_close(layer(x)[0], before)


@pytest.mark.parametrize("change", ["swap", "unswap", "quantize"])
def test_layers_whose_forward_was_replaced(change):
    """As tools that move weights about do; the new forward calls that of the class of before."""
    layer = fusedrnn.LSTM(3, 4).eval() if change == "unswap" else nn.LSTM(3, 4).eval()
    layer.before, cls = layer.forward, type(layer)
    layer.forward = lambda x: layer.before(x)
    x = torch.randn(5, 2, 3)
    expected = layer(x)[0]
    report = getattr(fusedrnn, change)(nn.Sequential(layer))
    assert f"its forward was replaced, and the new one may call the old: {change}" in str(report)
    assert type(layer) is cls and not report.changed
    assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("wrong", [None, 3, "model", nn.LSTM, [nn.LSTM(2, 3)], torch.zeros(2)])
@pytest.mark.parametrize("change", [fusedrnn.swap, fusedrnn.unswap])
def test_only_modules(change, wrong):
    with pytest.raises(TypeError, match=f"torch.nn.Module, got {type(wrong).__name__}"):
        change(wrong)


# What swap and unswap say


def mixed():
    parametrized = nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    layers = {
        "plain": nn.LSTM(3, 4),
        "own": OwnForward(3, 4),
        "list": nn.ModuleList([nn.GRUCell(3, 4), nn.Linear(3, 4)]),
        "parametrized": parametrized,
        "scripted": torch.jit.script(nn.GRU(3, 4)),
        "ours": fusedrnn.RNN(3, 4),
        "derived": OwnFused(3, 4),
    }
    return nn.ModuleDict(layers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_swap_says_what_it_did():
    model = mixed()
    report = fusedrnn.swap(model)
    assert report.model is model
    changed = {layer.name: (layer.before, layer.after) for layer in report.changed}
    assert changed == {
        "plain": ("torch.nn.LSTM", "fusedrnn.LSTM"),
        "list.0": ("torch.nn.GRUCell", "fusedrnn.GRUCell"),
    }
    left = {layer.name: layer.reason for layer in report.left}
    assert {name: reason.partition(":")[0].partition(",")[0] for name, reason in left.items()} == {
        "own": "a subclass of torch.nn.LSTM",
        "parametrized": "parametrized",
        "scripted": "compiled by TorchScript",
        "ours": "fusedrnn's already",
        "derived": "a subclass of fusedrnn's",
    }
    lines = repr(report).splitlines()
    assert lines[0] == "fusedrnn.swap of ModuleDict: 2 changed, 5 left"
    assert "plain: torch.nn.LSTM -> fusedrnn.LSTM" in lines[1]
    assert any(line.startswith("  own: left OwnForward: a subclass of") for line in lines)
    back = fusedrnn.unswap(model)
    assert {layer.name for layer in back.changed} == {"plain", "list.0", "ours"}
    assert {layer.name: layer.reason.partition(",")[0] for layer in back.left} == {
        "own": "not fusedrnn's",
        "parametrized": "not fusedrnn's",
        "derived": "a subclass of fusedrnn.LSTM",
    }


def test_a_report_of_nothing_and_of_the_model_itself():
    assert repr(fusedrnn.swap(nn.Linear(3, 4))) == (
        "fusedrnn.swap of Linear: it has no recurrent layers of torch.nn"
    )
    assert "(the model itself): torch.nn.GRU -> fusedrnn.GRU" in repr(fusedrnn.swap(nn.GRU(3, 4)))


def test_a_report_says_where_no_kernel_runs():
    (layer,) = fusedrnn.swap(nn.GRU(3, 4).to(torch.complex64)).changed
    assert layer.reason == ("torch.nn's code runs, because there is no kernel for torch.complex64")


MISUSES = {
    "call": lambda model: model(torch.zeros(5, 2, 3)),
    "attribute": lambda model: model.parameters(),
    "train": lambda model: model.train(),
    "index": lambda model: model[0],
    "iterate": lambda model: list(model),
    "copy": copy.deepcopy,
    "save": lambda model: torch.save(model, io.BytesIO()),
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("change", [fusedrnn.swap, fusedrnn.unswap])
def test_a_report_is_not_the_model(change, misuse):
    """`model = fusedrnn.swap(model)` fails where it is used, and says what to write."""
    model = change(nn.Sequential(nn.GRU(3, 4)))
    words = f"write fusedrnn.{change.__name__}(model) alone"
    with pytest.raises((TypeError, AttributeError), match=re.escape(words)):
        MISUSES[misuse](model)
    assert not hasattr(model, "weight")


def test_the_representation_shows_whose_layer_it_is():
    model = CharModel()
    text = repr(model)
    fusedrnn.swap(model)
    assert repr(model) == text.replace("LSTM(", "fusedrnn.LSTM(")
    assert repr(fusedrnn.LSTMCell(3, 4)) == "fusedrnn.LSTMCell(3, 4)"
    assert repr(OwnFused(3, 4)) == "OwnFused(3, 4)"


# explain and info


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_explain_names_the_kernels(name):
    layer = getattr(fusedrnn, name)(3, 4)
    text = fusedrnn.explain(layer, torch.zeros(5, 2, 3))
    assert text.startswith(f"fusedrnn.{name}(3, 4) on (5, 2, 3) torch.float32 cpu:")
    assert "fused CPU kernels, forward " in text and "\n  backward " in text


@pytest.mark.parametrize(
    ("x", "batch_first", "batch"),
    [
        (torch.zeros(5, 7, 3), False, 7),
        (torch.zeros(5, 7, 3), True, 5),
        (torch.zeros(9, 3), False, 1),
        (torch.zeros(9, 3), True, 1),
        (pack_padded_sequence(torch.zeros(7, 2, 3), [7, 2]), False, 2),
    ],
)
def test_explain_counts_rows(x, batch_first, batch):
    layer = fusedrnn.GRU(3, 4, batch_first=batch_first)
    rows = "1 row" if batch == 1 else f"{batch} rows"
    assert f" in 1 task of up to {rows}, each" in fusedrnn.explain(layer, x)


def test_explain_says_what_is_slow(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_THREADS")
    layer = fusedrnn.LSTM(3, 4)
    torch.set_num_threads(2)  # the next test sets its own
    assert "1 of 2 threads: 1 batch row in" in (
        text := fusedrnn.explain(layer, torch.zeros(9, 1, 3))
    )
    assert text.count("; 1 thread idle: too little work") == 2
    forward, backward = fusedrnn.explain(layer, torch.zeros(8, 1, 3)).splitlines()[1:]
    assert "1 of 2 threads: hidden units divided among threads; weights read unpacked" in forward
    assert "idle" not in forward and "weights read unpacked; 1 thread idle" in backward
    large = fusedrnn.LSTM(256, 256)
    assert "2 of 2 threads: hidden units" in fusedrnn.explain(large, torch.zeros(1, 1, 256))
    alone = fusedrnn.explain(large, torch.zeros(9, 1, 256))
    assert "1 task" in alone and "by 2 threads that divide the hidden units" in alone
    assert "idle" not in alone
    few = "; 1 thread idle: too few batch rows to divide"
    normed = fusedrnn.LSTM(256, 256, layer_norm=True)
    assert few in fusedrnn.explain(normed, torch.zeros(9, 1, 256))
    assert few in fusedrnn.explain(fusedrnn.RNN(5000, 64), torch.zeros(9, 1, 5000))
    assert "idle" not in fusedrnn.explain(large, torch.zeros(9, 2, 256))
    half = torch.zeros(5, 2, 3, dtype=torch.float16)
    assert "computed in float32" in fusedrnn.explain(layer.half(), half)
    found = fusedrnn.explain(layer.bfloat16(), half.bfloat16())
    assert ("products of pairs" in found) == (_C.cpu_variant() == "avx512bf16")
    assert ("products on tiles" in found) == (_C.cpu_variant() == "amx")


@pytest.mark.parametrize(
    ("x", "rows"),
    [
        (torch.zeros(5, 7, 3), 7),
        (torch.zeros(9, 3), 1),
        (torch.zeros(5, 7, dtype=torch.int64), 7),
        (pack_padded_sequence(torch.zeros(7, 2, 3), [7, 2]), 2),
    ],
)
def test_explain_of_an_ensemble(x, rows):
    layer = fusedrnn.GRU(3, 4)
    head, forward, backward, *_ = fusedrnn.explain(layer, x, members=16).splitlines()
    assert head.endswith("cpu, of each of 16 members:")
    each = f"{16 * rows} batch rows of 16 members in 16 tasks of up to {rows} row"
    assert each in forward and each in backward
    step = fusedrnn.explain(layer, torch.zeros(1, 1, 3), members=4)
    assert "4 members divided among threads; weights read unpacked" in step
    assert fusedrnn.explain(nn.Sequential(layer), x, members=16).count(each) == 2
    one = fusedrnn.explain(layer, x, members=1).splitlines()[1:]
    assert one == fusedrnn.explain(layer, x).splitlines()[1:]
    with pytest.raises(ValueError, match="at least one member"):
        fusedrnn.explain(layer, x, members=0)


def stacked(layers):
    """The parameters of an ensemble, and a function of one member's and its input."""
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def member(parameters, x, *batch_sizes):
        given = PackedSequence(x, *batch_sizes) if batch_sizes else x
        y = torch.func.functional_call(skeleton, parameters, (given,))
        y = y[0] if isinstance(y, tuple) else y
        return y.data if batch_sizes else y

    return torch.func.stack_module_state(layers)[0], member


VMAP_RAISES = "under torch.vmap they raise an error, because they have no batching rule"
IN_GRAD = "; inside of torch.func.grad they run, step by step or member by member"


@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_explain_of_an_ensemble_of_torch_nn_s_layers(cls, dtype):
    """And what really becomes of such a call."""
    layers, x = [cls(3, 4, dtype=dtype) for _ in range(2)], torch.randn(2, 5, 6, 3, dtype=dtype)
    text = fusedrnn.explain(layers[0], x[0], members=2)
    assert "of each of 2 members: torch.nn's own kernels" in text and "fusedrnn.swap" in text
    assert text.endswith(f"\n  {VMAP_RAISES}{IN_GRAD}")
    assert text in fusedrnn.explain(nn.Sequential(layers[0]), x[0], members=2)
    parameters, member = stacked(layers)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(member)(parameters, x)
    gradients = torch.func.grad(lambda *given: member(*given).sum())
    found = torch.vmap(gradients)(parameters, x)
    for m, layer in enumerate(layers):
        expected = torch.autograd.grad(layer(x[m])[0].sum(), layer.parameters())
        for ours, theirs in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(ours[m], theirs)

    packed = pack_padded_sequence(x[0], [5, 4, 3, 2, 1, 1])
    assert fusedrnn.explain(layers[0], packed, members=2).endswith(f"\n  {VMAP_RAISES}")
    data, sizes = packed.data.expand(2, -1, -1), packed.batch_sizes
    for call in (member, gradients):
        with pytest.raises(RuntimeError):
            torch.vmap(call, (0, 0, None))(parameters, data, sizes)


def test_explain_of_ensembles_that_fall_back():
    layers = [fusedrnn.GRU(3, 4, dtype=torch.complex64) for _ in range(2)]
    x = torch.randn(2, 5, 6, 3, dtype=torch.complex64)
    assert VMAP_RAISES in fusedrnn.explain(layers[0], x[0], members=2)
    assert VMAP_RAISES not in fusedrnn.explain(layers[0], x[0])
    parameters, member = stacked(layers)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(member)(parameters, x)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("package", [nn, fusedrnn])
def test_explain_of_an_ensemble_of_cells(package, name):
    cells, x = [getattr(package, name)(3, 4) for _ in range(2)], torch.randn(2, 5, 3)
    text = fusedrnn.explain(cells[0], x[0], members=2)
    assert "of each of 2 members: torch.nn's own code, one step a call" in text
    parameters, member = stacked(cells)
    if package is nn and name == "LSTMCell":
        assert text.endswith(f": see fusedrnn.swap\n  {VMAP_RAISES}{IN_GRAD}")
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.vmap(member)(parameters, x)
        torch.vmap(torch.func.grad(lambda *given: member(*given).sum()))(parameters, x)
    else:
        assert VMAP_RAISES not in text
        torch.vmap(member)(parameters, x)


def test_explain_passes_a_model_s_own_members_by_position():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.GRU(3, 4)

        def forward(self, x, members=1):
            return self.rnn(x.repeat(1, members, 1))

    text = fusedrnn.explain(Model(), torch.zeros(5, 2, 3), 7)
    assert "on (5, 14, 3)" in text and "members" not in text
    assert "of each of 7 members" in fusedrnn.explain(Model(), torch.zeros(5, 2, 3), 7, members=7)


def test_explain_says_why_not_ours():
    x = torch.zeros(5, 2, 3)
    assert "fusedrnn.swap" in fusedrnn.explain(nn.LSTM(3, 4), x)
    layer = fusedrnn.LSTM(3, 4)
    assert "no kernel for meta" in fusedrnn.explain(layer, x.to("meta"))
    layer.to(torch.complex64)
    assert "no kernel for torch.complex64" in fusedrnn.explain(layer, x.to(torch.complex64))


@pytest.mark.parametrize("wrong", [nn.Linear(3, 4), nn.Sequential(), nn.LSTM, None])
def test_explain_takes_layers(wrong):
    with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
        fusedrnn.explain(wrong, torch.zeros(5, 2, 3))


def test_explain_runs_nothing():
    layer = fusedrnn.LSTM(3, 4)
    layer.register_forward_pre_hook(lambda *_: pytest.fail("forward was called"))
    fusedrnn.explain(layer, torch.zeros(1_000_000, 1, 3))


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("swapped", [False, True])
def test_explain_answers_for_every_layer_of_a_model(build, swapped):
    model = build()
    if swapped:
        fusedrnn.swap(model)
    state, modules = torch.get_rng_state(), [dict(vars(m)) for m in model.modules()]
    text = fusedrnn.explain(model, *build.batch())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.RNNBase):
            (line,) = [line for line in text.splitlines() if line.startswith(name)]
            assert repr(layer) in line and ("torch.nn's own kernels" in line) != swapped
    assert text.count("fused CPU kernels") == swapped * sum(
        isinstance(layer, nn.RNNBase) for layer in model.modules()
    )
    assert text.count("\n  backward ") == text.count("fused CPU kernels, forward ")
    assert [dict(vars(m)) for m in model.modules()] == modules
    torch.set_rng_state(state)


def test_explain_in_autocast_is_of_the_dtype_that_runs():
    layer, x = fusedrnn.GRU(64, 64), torch.zeros(40, 32, 64)
    low = fusedrnn.explain(copy.deepcopy(layer).bfloat16(), x.bfloat16()).splitlines()[1:]
    with torch.autocast("cpu", torch.bfloat16):
        assert fusedrnn.explain(layer, x).splitlines()[1:] == low
        tokens = torch.zeros(40, 32, dtype=torch.int64)
        assert fusedrnn.explain(layer, tokens)


def test_explain_counts_calls():
    model = fusedrnn.swap(Translator()).model
    model.unused = nn.GRU(3, 4)
    text = fusedrnn.explain(model, *Translator.batch())
    assert "decoder (4 calls): fusedrnn.LSTM(6, 8, num_layers=2) on (1, 4, 6)" in text
    assert "encoder: fusedrnn.LSTM" in text and "bridge: fusedrnn.RNNCell(8, 8) on (4, 8)" in text
    assert "unused: not called" in text


@pytest.mark.parametrize("which", ["layer", "model"])
def test_explain_of_what_module_compile_compiled(which):
    model, x = nn.Sequential(fusedrnn.GRU(3, 4)), torch.randn(5, 2, 3)
    (model[0] if which == "layer" else model).compile(backend="eager")
    assert "0: fusedrnn.GRU(3, 4) on (5, 2, 3)" in fusedrnn.explain(model, x)
    assert not model[0]._forward_pre_hooks


class Flags(nn.GRU):
    """What it takes is not what torch.nn's takes."""

    def forward(self, input, flag):
        return super().forward(input if flag else -input)


class FusedFlags(fusedrnn.GRU):
    def forward(self, input, flag):
        return super().forward(input if flag else -input)


@pytest.mark.parametrize("cls", [Flags, FusedFlags])
def test_explain_of_subclasses_with_arguments_of_their_own(cls):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.plain = cls(3, 4), fusedrnn.GRU(4, 2)

        def forward(self, x):
            return self.plain(self.rnn(x, flag=True)[0])

    text = fusedrnn.explain(Model(), torch.randn(5, 2, 3))
    assert f"rnn: {cls.__name__}(3, 4): its own forward" in text
    assert "plain: fusedrnn.GRU(4, 2) on (5, 2, 4)" in text
    assert "its own forward" in fusedrnn.explain(cls(3, 4), torch.randn(5, 2, 3), 1)
    with pytest.raises(TypeError, match="flag"):
        fusedrnn.explain(nn.Sequential(cls(3, 4)), torch.randn(5, 2, 3))


def test_explain_leaves_a_model_as_it_was():
    """Its buffers, what it remembers, and torch's generator."""

    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
            self.rnn, self.state = nn.GRU(3, 4), None

        def forward(self, x):
            y, self.state = self.rnn(self.drop(self.norm(x.mT).mT), self.state)
            return y

    model = fusedrnn.swap(Stateful()).model
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    generator = torch.get_rng_state()
    assert "rnn: fusedrnn.GRU(3, 4) on (5, 2, 3)" in fusedrnn.explain(model, torch.randn(5, 2, 3))
    torch.manual_seed(0)
    assert model.state is None
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    torch.set_rng_state(generator)
    x = torch.randn(5, 2, 3)
    torch.set_rng_state(generator)
    fusedrnn.explain(model, x)
    assert torch.equal(torch.get_rng_state(), generator)


WRONG_CALLS = {
    "1-D": (torch.zeros(3),),
    "4-D": (torch.zeros(5, 2, 3, 1),),
    "width": (torch.zeros(5, 2, 4),),
    "dtype": (torch.zeros(5, 2, 3).double(),),
    "no steps": (torch.zeros(0, 2, 3),),
    "packed width": (pack_padded_sequence(torch.zeros(5, 2, 4), [5, 3]),),
    "state rows": (torch.zeros(5, 2, 3), torch.zeros(1, 3, 4)),
    "state dims": (torch.zeros(5, 2, 3), torch.zeros(1, 4)),
    "None": (None,),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("which", WRONG_CALLS)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_explain_raises_what_the_call_would(name, which, inside):
    class Model(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args):
            return self.layer(*args)

    for package in (nn, fusedrnn):
        layer = getattr(package, name)(3, 4)
        with pytest.raises(Exception) as called:
            layer(*WRONG_CALLS[which])
        with pytest.raises(type(called.value)) as explained:
            fusedrnn.explain(Model(layer) if inside else layer, *WRONG_CALLS[which])
        if which != "None" or package is fusedrnn:
            assert str(explained.value) == str(called.value)


TOKENS = torch.tensor([[0, 1], [2, 0], [1, 9], [-1, 1], [0, 0]])
WRONG_VALUES = {
    "length above T": (torch.zeros(5, 2, 3), [5, 6]),
    "length below 0": (torch.zeros(5, 2, 3), [-1, 5]),
    "token": (TOKENS, None),
    "token, packed": (pack_padded_sequence(TOKENS, [5, 3]), None),
    "token within a length": (TOKENS, [4, 2]),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("which", WRONG_VALUES)
def test_explain_raises_what_the_call_would_of_values(which, quantized, batch_first):
    layer = fusedrnn.GRU(3, 4, batch_first=batch_first).eval()
    if quantized:
        fusedrnn.quantize(layer)
    input, lengths = WRONG_VALUES[which]
    if batch_first and "packed" not in which:
        input = input.transpose(0, 1)
    with pytest.raises((RuntimeError, IndexError)) as called:
        layer(input, lengths=lengths)
    with pytest.raises(type(called.value)) as explained:
        fusedrnn.explain(layer, input, lengths=lengths)
    assert str(explained.value) == str(called.value)
    if input is TOKENS:
        assert "gathered" in fusedrnn.explain(layer, input, lengths=[3, 2])


def test_explain_of_cells_and_of_what_torch_does_not_have():
    x = torch.zeros(2, 3)
    assert "torch.nn's own code" in fusedrnn.explain(nn.LSTMCell(3, 4), x)
    for cell in (nn.GRUCell(3, 4), fusedrnn.GRUCell(3, 4)):
        with pytest.raises(RuntimeError, match="inconsistent input_size: got 3 expected 5"):
            fusedrnn.explain(type(cell)(5, 4), x)
    layer, tokens = fusedrnn.GRU(3, 4), torch.zeros(5, 2, dtype=torch.int64)
    assert "gathered" in fusedrnn.explain(layer, tokens, lengths=torch.tensor([5, 2]))
    with pytest.raises(RuntimeError, match="lengths of shape"):
        fusedrnn.explain(layer, tokens, lengths=torch.tensor([5]))
    with pytest.raises(RuntimeError, match="Expected resets of shape"):
        fusedrnn.explain(layer, tokens, resets=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        fusedrnn.explain(nn.GRU(3, 4), tokens)
    with pytest.raises(TypeError, match="takes no lengths: fusedrnn.swap"):
        fusedrnn.explain(nn.GRU(3, 4), torch.zeros(5, 2, 3), lengths=torch.tensor([5, 2]))


def test_info():
    found = fusedrnn.info()
    assert found["fusedrnn"] == fusedrnn.__version__
    assert found["torch"] == torch.__version__
    assert found["cpu kernels"].startswith(_C.cpu_variant())
    assert all(name in found["cpu kernels"] for name, _ in _C.cpu_variants())
    assert found["cpu threads"] == "1"
    assert all(isinstance(value, str) and value for value in found.values())


def test_explain_of_a_model_that_cannot_be_copied():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = fusedrnn.GRU(3, 4), None

        def forward(self, x):
            y, self.last = self.rnn(x)
            return y

    model, x = Stateful(), torch.randn(5, 2, 3)
    model(x)
    with pytest.raises(RuntimeError, match="a copy of Stateful, which cannot be copied"):
        fusedrnn.explain(model, x)
