"""Outputs that are written in place before backward: what torch.nn trains is trained."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from cases import CELLS, make_pair, random_state
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedrnn

T, B, INPUT, HIDDEN = 7, 3, 4, 9


def add(y, states, x):
    y += x.mean()
    return y


def without_gradient(y, states, x):
    with torch.no_grad():
        y.mul_(2)
    return y.square()


def through_an_alias(y, states, x):
    y.detach()[0].fill_(3)
    return y.square()


def write_states(y, states, x):
    states[0].mul_(2)
    states[-1].add_(1)
    return y.square().mean() * (states[0].square().sum() + states[-1].square().sum())


WRITES = {
    "+=": add,
    "relu_": lambda y, states, x: y.relu_(),
    "dropout": lambda y, states, x: nn.functional.dropout(y, 0.5, inplace=True),
    "last step": lambda y, states, x: (y[-1].zero_(), y.square())[1],
    "mask": lambda y, states, x: y.masked_fill_(y < -0.1, 0.5).square(),
    "item": lambda y, states, x: (y.__setitem__(0, x.mean()), y.square())[1],
    "twice": lambda y, states, x: y.mul_(3).add_(1).square(),
    "without gradient": without_gradient,
    "through an alias": through_an_alias,
    "states": write_states,
}


class Copied(nn.Module):
    """A layer whose results are copies: writing those touches nothing that was saved."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        y, state = self.layer(*args, **kwargs)
        y = y._replace(data=y.data.clone()) if isinstance(y, PackedSequence) else y.clone()
        return y, tuple(s.clone() for s in state) if isinstance(state, tuple) else state.clone()


def gradients(module, write, x, hx=None, wrap=lambda call, x: call(x), **kwargs):
    """Those of a loss behind `write`, for the data of x and all parameters."""
    data = x.data if isinstance(x, PackedSequence) else x
    data = data.detach().clone()
    if data.is_floating_point():
        data.requires_grad_()

    def call(data):
        given = x._replace(data=data) if isinstance(x, PackedSequence) else data
        y, state = module(given, hx, **kwargs)
        y = y.data if isinstance(y, PackedSequence) else y
        return write(y, state if isinstance(state, tuple) else (state,), data.float()).sum()

    torch.manual_seed(5)
    loss = wrap(call, data)
    inputs = [*module.parameters(), *([data] if data.requires_grad else [])]
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert any(g is not None and g.any() for g in first)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cell", CELLS)
def test_as_torch(cell, write):
    plain, fused = make_pair(cell, INPUT, HIDDEN, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    found = gradients(fused, WRITES[write], x)
    if write not in ("without gradient", "through an alias"):  # these torch.nn refuses at times
        for a, b in zip(found, gradients(plain, WRITES[write], x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert_same(found, gradients(Copied(fused), WRITES[write], x))


def packed(x):
    return pack_padded_sequence(x, [T, 2, 3], enforce_sorted=False)


CALLS = {  # name -> (constructor's arguments, what x becomes, forward's arguments)
    "batch_first": ({"batch_first": True}, lambda x: x, {}),
    "unbatched": ({}, lambda x: x[:, 0], {}),
    "packed": ({}, packed, {}),
    "bidirectional": ({"bidirectional": True}, lambda x: x, {}),
    "integers": ({}, lambda x: torch.randint(0, INPUT, (T, B)), {}),
    "lengths": ({}, lambda x: x, {"lengths": torch.tensor([2, T, 3])}),
    "resets": ({}, lambda x: x, {"resets": torch.rand(T, B) < 0.3}),
    "dropout": ({"num_layers": 3, "dropout": 0.5}, lambda x: x, {}),
    "one step": ({}, lambda x: x[:1], {}),
}
OURS = {
    "recompute": {"recompute": True},
    "regularisers": {"recurrent_dropout": 0.3, "zoneout": 0.4, "num_layers": 2},
    "layer_norm": {"layer_norm": True, "num_layers": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_call(cell, which, dtype):
    options, shape, kwargs = CALLS[which]
    _, fused = make_pair(cell, INPUT, HIDDEN, dtype=dtype, **options)
    x = shape(torch.randn(T, B, INPUT).to(dtype))
    assert_same(
        gradients(fused, WRITES["relu_"], x, **kwargs),
        gradients(Copied(fused), WRITES["relu_"], x, **kwargs),
    )


@pytest.mark.parametrize("which", OURS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_every_option(cell, which):
    plain, _ = make_pair(cell, INPUT, HIDDEN)
    fused = getattr(fusedrnn, type(plain).__name__)(INPUT, HIDDEN, **OURS[which])
    x, states = torch.randn(T, B, INPUT), random_state(fused, B)
    hx = states if cell == "lstm" else states[0]
    assert_same(
        gradients(fused, WRITES["+="], x, hx), gradients(Copied(fused), WRITES["+="], x, hx)
    )


def test_in_autocast():
    _, fused = make_pair("gru", INPUT, HIDDEN)
    x = torch.randn(T, B, INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        found = [gradients(m, WRITES["+="], x) for m in (fused, Copied(fused))]
    assert_same(*found)


class Calls(TorchDispatchMode):
    """Counts calls of the forward op."""

    def __init__(self):
        super().__init__()
        self.forward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.fusedrnn.forward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [None, [T, 1, *[2] * (B - 2)]], ids=["", "lengths"])
@pytest.mark.parametrize("write", [False, True])
def test_only_what_was_written_is_run_again(write, lengths):
    _, fused = make_pair("gru", INPUT, HIDDEN)
    y = fused(torch.randn(T, B, INPUT), lengths=lengths)[0]
    loss = (y.relu_() if write else y.relu()).sum()
    with Calls() as calls:
        loss.backward()
    assert calls.forward == write


def test_import_under_another_default_device():
    """A model made on the meta device, with fusedrnn first imported there."""
    program = """
import torch
with torch.device("meta"):
    import fusedrnn
fusedrnn.GRU(3, 4)(torch.randn(2, 1, 3))[0].sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_gradients_enabled_in_inference_mode():
    """torch.nn runs, and records nothing."""
    plain, fused = make_pair("gru", INPUT, HIDDEN)
    x = torch.randn(T, B, INPUT)
    with torch.inference_mode(), torch.enable_grad():
        for kwargs in ({}, {"lengths": [T] * B}):
            y, _ = fused(x, **kwargs)
            assert torch.allclose(y, plain(x)[0], atol=1e-6) and y.grad_fn is None


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cell", CELLS)
def test_in_a_checkpoint(cell, write):
    """Which runs the write again, into what is to be saved: torch looks at no version there."""
    _, fused = make_pair(cell, INPUT, HIDDEN, num_layers=2)
    x = torch.randn(T, B, INPUT)
    again = lambda call, x: checkpoint(call, x, use_reentrant=False)  # noqa: E731
    found = gradients(fused, WRITES[write], x, wrap=again)
    assert_same(found, gradients(Copied(fused), WRITES[write], x))


@pytest.mark.parametrize("hooks", ["save_on_cpu", "identity"])
def test_with_hooks_on_saved_tensors(hooks):
    _, fused = make_pair("lstm", INPUT, HIDDEN)
    x = torch.randn(T, B, INPUT)

    def wrap(call, x):
        if hooks == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return call(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return call(x)

    found = gradients(fused, WRITES["+="], x, wrap=wrap)
    assert_same(found, gradients(Copied(fused), WRITES["+="], x))


def test_nothing_holds_what_a_hook_moved_away():
    """The version is kept without the memory of the output, whose hook saved nothing of it."""
    _, fused = make_pair("gru", INPUT, HIDDEN)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t):
        y, _ = fused(torch.randn(T, B, INPUT))
    node, storage = y.grad_fn, weakref.ref(y.untyped_storage())
    alive = y.untyped_storage()._weak_ref()
    del y
    gc.collect()
    assert node is not None and storage() is None
    assert torch.UntypedStorage._expired(alive)
    torch.UntypedStorage._free_weak_ref(alive)


@pytest.mark.parametrize("cell", CELLS)
def test_more_than_one_backward(cell):
    """With retain_graph, with a second write between, and through the first backward."""
    plain, fused = make_pair(cell, INPUT, HIDDEN, dtype=torch.float64)
    x, results = torch.randn(T, B, INPUT, dtype=torch.float64), []
    for module in (plain, fused):
        y, _ = module(x)
        y.mul_(2)
        loss = y.clone().square().sum()
        first = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        again = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        y.detach().zero_()
        second = torch.autograd.grad(sum(g.square().sum() for g in first), module.weight_hh_l0)
        results.append([*first, *again, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("write", ["+=", "relu_", "last step", "states"])
@pytest.mark.parametrize("cell", CELLS)
def test_compiled(cell, write):
    _, fused = make_pair(cell, INPUT, HIDDEN, num_layers=2)
    torch.compiler.reset()
    wrap = lambda call, x: torch.compile(call, backend="aot_eager", fullgraph=True)(x)  # noqa: E731
    x = torch.randn(T, B, INPUT)
    found = gradients(fused, WRITES[write], x, wrap=wrap)
    for a, b in zip(found, gradients(Copied(fused), WRITES[write], x), strict=True):
        torch.testing.assert_close(a, b)
