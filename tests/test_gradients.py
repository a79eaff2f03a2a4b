"""Gradients of the first and higher orders, and what autograd promises about them."""

import copy
import gc
import re
import weakref

import pytest
import torch
import torch.func as func
from cases import CELLS, make_pair, random_state
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedrnn

# Forward mode of torch's own operators loads decompositions that are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")

STACKS = [(1, False), (1, True), (2, False), (2, True)]
INPUTS = ["padded", "lengths", "packed"]


def make_input(kind, T=3, B=3, width=2):
    """(input, keyword arguments) of one of INPUTS."""
    x = torch.randn(T, B, width, dtype=torch.float64)
    lengths = torch.tensor([T, 1, T - 1, *[T] * B][:B])
    if kind == "packed":
        return pack_padded_sequence(x, lengths, enforce_sorted=False), {}
    return x, {"lengths": lengths} if kind == "lengths" else {}


def as_function(module, x, states, **kwargs):
    """`module` as a function of tensors alone, and those tensors: data, states, parameters."""
    names = [name for name, _ in module.named_parameters()]
    packed = isinstance(x, PackedSequence)

    def call(data, *rest):
        hx, parameters = rest[: len(states)], dict(zip(names, rest[len(states) :], strict=True))
        given = x._replace(data=data) if packed else data
        lstm = len(states) == 2
        y, state = functional_call(module, parameters, (given, hx if lstm else hx[0]), kwargs)
        return (y.data if packed else y, *(state if lstm else (state,)))

    inputs = [x.data if packed else x, *states, *module.parameters()]
    return call, [t.detach().clone().requires_grad_() for t in inputs]


def derivatives(call, inputs, orders):
    """The gradients of every order up to `orders`, each of a smooth form of all before it."""
    form = torch.Generator().manual_seed(3)
    values, found = call(*inputs), []
    for order in range(orders):
        loss = 0
        for v in values:
            weight = torch.randn(v.shape, generator=form, dtype=v.dtype)
            loss = loss + (weight * v.square()).sum()
        values = torch.autograd.grad(
            loss, inputs, create_graph=order + 1 < orders, materialize_grads=True
        )
        found.append([v.detach() for v in values])
    return found


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("layers", "bidirectional"), STACKS)
@pytest.mark.parametrize("cell", CELLS)
def test_first_derivatives(cell, layers, bidirectional, kind):
    _, fused = make_pair(
        cell, 2, 3, num_layers=layers, bidirectional=bidirectional, dtype=torch.float64
    )
    x, kwargs = make_input(kind)
    call, inputs = as_function(fused, x, random_state(fused, 3), **kwargs)
    assert gradcheck(call, inputs, fast_mode=layers == 2)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell, kind):
    _, fused = make_pair(cell, 2, 2, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, kwargs = make_input(kind)
    call, inputs = as_function(fused, x, random_state(fused, 3), **kwargs)
    assert gradgradcheck(call, inputs, fast_mode=True)


class Elements(TorchDispatchMode):
    """Counts the elements of all results."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves(results) if isinstance(t, torch.Tensor))
        return results


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_grow_with_the_steps(cell):
    """Hardly with their square: no step has gradients of the size of all pre-activations."""
    _, fused = make_pair(cell, 2, 8, num_layers=2)
    found = []
    for steps in (20, 80):
        x = torch.randn(steps, 2, 2, requires_grad=True)
        with Elements() as elements:
            (dx,) = torch.autograd.grad(fused(x)[0].sum(), x, create_graph=True)
            dx.square().sum().backward()
        found.append(elements.count)
    assert found[1] < 8 * found[0]  # of four times the steps; with such gradients above 9


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode(cell, kind):
    _, fused = make_pair(cell, 2, 2, bidirectional=True, dtype=torch.float64)
    x, kwargs = make_input(kind, T=2)
    call, inputs = as_function(fused, x, random_state(fused, 3), **kwargs)
    assert gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)
    if kind == "padded":
        assert gradgradcheck(call, inputs, fast_mode=True, check_fwd_over_rev=True)


def batched_gradients(f, x):
    y = f(x.requires_grad_())
    forms = torch.ones(3, *y.shape, dtype=y.dtype).cumsum(0)
    return torch.autograd.grad(y, x, forms, is_grads_batched=True)[0]


def of_parameters(f, x):
    """The gradient of a function of the module's parameters, f having them in its closure."""
    module = f.module
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return func.grad(lambda p: functional_call(module, p, (x,))[0].square().sum())(parameters)


TRANSFORMS = {
    "grad": lambda f, x: func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(lambda x: f(x).sum())(x),
    "grad of parameters": of_parameters,
    "batched gradients": batched_gradients,
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_function_transforms_are_those_of_torch(cell, transform):
    plain, fused = make_pair(cell, 2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, results = torch.randn(4, 2, 2, dtype=torch.float64), []
    for module in (plain, fused):

        def f(x, module=module):
            return module(x)[0].sin()

        f.module = module
        found = TRANSFORMS[transform](f, x.clone())
        results.append(found if isinstance(found, dict) else {"result": found})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_three_orders_are_those_of_torch(cell, kind, bias):
    plain, fused = make_pair(
        cell, 2, 3, num_layers=2, bidirectional=True, bias=bias, dtype=torch.float64
    )
    x, _ = make_input(kind)
    states = random_state(plain, 3)
    theirs, ours = (derivatives(*as_function(m, x, states), orders=3) for m in (plain, fused))
    for order in zip(ours, theirs, strict=True):
        for a, b in zip(*order, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@pytest.mark.parametrize("given", [("x",), ("weight_hh_l0",), ("h_0", "bias_ih_l1")])
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_of_some_inputs(cell, given):
    """A gradient penalty on a few inputs, the rest of the model trained by it."""
    plain, fused = make_pair(cell, 3, 4, num_layers=2, dtype=torch.float64)
    x, h0 = torch.randn(4, 2, 3, dtype=torch.float64), random_state(plain, 2)
    results = []
    for module in (plain, fused):
        leaves = {"x": x.clone().requires_grad_(), "h_0": h0[0].clone().requires_grad_()}
        hx = (leaves["h_0"], h0[1]) if module.mode == "LSTM" else leaves["h_0"]
        y, _ = module(leaves["x"], hx)
        tensors = leaves | dict(module.named_parameters())
        first = torch.autograd.grad(
            y.square().sum(), [tensors[name] for name in given], create_graph=True
        )
        sum(g.square().sum() for g in first).backward()
        results.append({name: t.grad for name, t in tensors.items()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_create_graph_changes_no_bit(cell):
    _, fused = make_pair(cell, 5, 7, num_layers=2, bidirectional=True)
    call, inputs = as_function(fused, torch.randn(6, 4, 5), random_state(fused, 4))
    loss = sum(r.square().sum() for r in call(*inputs))
    with_graph = torch.autograd.grad(loss, inputs, create_graph=True)
    without = torch.autograd.grad(loss, inputs)
    for a, b in zip(with_graph, without, strict=True):
        assert a.requires_grad
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_can_be_repeated(cell):
    _, fused = make_pair(cell, 5, 7, num_layers=2, bidirectional=True)
    call, inputs = as_function(fused, torch.randn(6, 4, 5), random_state(fused, 4))
    loss = sum(r.square().sum() for r in call(*inputs))
    runs = [torch.autograd.grad(loss, inputs, retain_graph=i < 2) for i in range(3)]
    for grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0], strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_each_result_alone(cell):
    """What a loss leaves out of the results is as if its gradient were zero."""
    plain, fused = make_pair(cell, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, states = torch.randn(5, 2, 3, dtype=torch.float64), random_state(plain, 2)
    for i in range(1 + len(states)):
        grads = []
        for module in (plain, fused):
            call, inputs = as_function(module, x, states)
            loss = call(*inputs)[i].square().sum()
            grads.append(torch.autograd.grad(loss, inputs, materialize_grads=True))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


FROZEN = {  # what still asks for a gradient
    "input only": r"x",
    "state only": r"h_0",
    "cell state only": r"c_0",
    "lower layer": r".*_l0.*",
    "upper layer": r".*_l1.*",
    "one direction": r".*_reverse",
    "recurrent weights": r"weight_hh.*",
    "biases and the state": r"bias.*|h_0",
    "one bias of two": r"bias_hh.*",
    "projections": r"weight_hr.*",
    "nothing": r"$",
}


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("cell", CELLS)
def test_frozen_subsets(cell, which):
    plain, fused = make_pair(cell, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, states = torch.randn(5, 2, 3, dtype=torch.float64), random_state(plain, 2)
    results = []
    for module in (plain, fused):
        given = [t.clone() for t in (x, *states)]
        leaves = dict(zip(("x", "h_0", "c_0"), given, strict=False))
        tensors = leaves | dict(module.named_parameters())
        for name, t in tensors.items():
            t.requires_grad_(re.fullmatch(FROZEN[which], name) is not None)
        y, _ = module(given[0], tuple(given[1:]) if module.mode == "LSTM" else given[1])
        if y.requires_grad:
            y.square().sum().backward()
        results.append((y.requires_grad, {name: t.grad for name, t in tensors.items()}))
    (plain_asks, theirs), (fused_asks, ours) = results
    assert fused_asks == plain_asks
    assert {n for n, g in ours.items() if g is None} == {n for n, g in theirs.items() if g is None}
    for name, grad in theirs.items():
        if grad is not None:
            torch.testing.assert_close(ours[name], grad, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_accumulate(cell):
    _, fused = make_pair(cell, 3, 4)
    x = torch.randn(5, 2, 3)
    fused(x)[0].sum().backward()
    once = {name: p.grad.clone() for name, p in fused.named_parameters()}
    fused(x)[0].sum().backward()
    for name, p in fused.named_parameters():
        assert torch.equal(p.grad, 2 * once[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_eval_mode_has_a_backward(cell):
    _, fused = make_pair(cell, 3, 4, num_layers=2)
    in_eval = copy.deepcopy(fused).eval()
    x = torch.randn(5, 2, 3)
    for module in (fused, in_eval):
        module(x)[0].square().sum().backward()
    for p, q in zip(fused.parameters(), in_eval.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("changed", ["input", "state", "weight_hh_l0", "bias_ih_l1"])
@pytest.mark.parametrize("cell", CELLS)
def test_changes_in_place_are_noticed(cell, changed):
    _, fused = make_pair(cell, 3, 4, num_layers=2)
    x, states = torch.randn(5, 2, 3, requires_grad=True), random_state(fused, 2)
    y, _ = fused(x, states if fused.mode == "LSTM" else states[0])
    tensors = {"input": x, "state": states[0], **dict(fused.named_parameters())}
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_states_can_be_detached_in_place(cell):
    """As loops of truncated back-propagation through time do."""
    _, fused = make_pair(cell, 3, 4, num_layers=2)
    state = None
    for _ in range(3):
        y, state = fused(torch.randn(5, 2, 3), state)
        y.sum().backward()
        for s in state if fused.mode == "LSTM" else (state,):
            s.detach_()
            assert s.grad_fn is None


@pytest.mark.parametrize("cell", CELLS)
def test_no_graph_where_none_is_wanted(cell):
    _, fused = make_pair(cell, 3, 4, num_layers=2)
    x = torch.randn(5, 2, 3, requires_grad=True)
    with torch.no_grad():
        y, _ = fused(x)
        assert not y.requires_grad
        assert y.grad_fn is None
    with torch.inference_mode():
        z, _ = fused(x)
        assert z.is_inference()
    assert torch.equal(y, z)
    fused.requires_grad_(False)
    assert not fused(x.detach())[0].requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_inference_tensors_are_accepted(cell):
    _, fused = make_pair(cell, 3, 4)
    with torch.inference_mode():
        x = torch.randn(5, 2, 3)
    fused.requires_grad_(False)
    with torch.no_grad():
        expected = fused(x.clone())[0]
    assert torch.equal(fused(x)[0], expected)


@pytest.mark.parametrize("through", [True, False])
def test_what_was_saved_is_freed_with_the_results(through):
    _, fused = make_pair("lstm", 3, 4)
    gc.disable()  # no cycle keeps it until a collection
    try:
        y = fused(torch.randn(5, 2, 3))[0]
        node = weakref.ref(y.grad_fn)
        if through:
            y.sum().backward()
        del y
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_keeps_nothing_and_changes_no_bit(cell):
    _, fused = make_pair(cell, 5, 33, num_layers=2, bidirectional=True, dropout=0.5)
    x, found, kept = torch.randn(7, 9, 5), [], []
    for recompute in (False, True):
        fused.recompute = recompute
        torch.manual_seed(1)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, to=sizes: to.append(t.nbytes) or t, lambda t: t
        ):
            y, state = fused(x)
        kept.append(sum(sizes))
        loss = y.sum() + sum((s * s).sum() for s in (state if fused.mode == "LSTM" else [state]))
        found.append(torch.autograd.grad(loss, list(fused.parameters()), create_graph=True))
    for a, b in zip(*found, strict=True):
        assert a.any() and torch.equal(a, b)
    # At least the first layer's output, which every cell keeps.
    assert kept[0] - kept[1] >= 7 * 9 * 2 * 33 * 4
    second = torch.autograd.grad(sum((g * g).sum() for g in found[1]), fused.weight_hh_l0)[0]
    assert second.any()


def test_recompute_is_a_keyword_and_shown():
    assert repr(fusedrnn.GRU(3, 4, recompute=True)) == "fusedrnn.GRU(3, 4, recompute=True)"
    assert "recompute" not in vars(fusedrnn.GRU(3, 4))
