"""vmap over stacked weights: one op call, whose members have the bits that they have alone."""

import copy

import pytest
import test_ops
import torch
from cases import CELLS, make_pair, random_state
from test_batching import close, flat, kernels_only  # noqa: F401
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn import ops

E = 3  # members


def ensemble(cell, **kwargs):
    """Members, their stacked parameters, and a layer to call with them."""
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64} | kwargs
    size = options.pop("hidden", 5)
    members = [make_pair(cell, 3, size, seed=seed, **options)[1] for seed in range(E)]
    stacked, _ = stack_module_state(members)
    return (
        members,
        {n: p.detach() for n, p in stacked.items()},
        copy.deepcopy(members[0]).to("meta"),
    )


class Calls(TorchDispatchMode):
    """Counts the calls of our ops that reach a backend."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedrnn":
            self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("shared", [True, False])
def test_one_call_runs_all_members(shared):
    _, stacked, skeleton = ensemble("gru")
    x = torch.randn(4, 2, 3, dtype=torch.float64) if shared else torch.randn(E, 4, 2, 3).double()
    dims = (0, None if shared else 0)

    def forward(parameters, x):
        return functional_call(skeleton, parameters, (x,))[0]

    with Calls() as calls:
        vmap(forward, dims)(stacked, x)
        vmap(grad(lambda p, x: forward(p, x).sin().sum()), dims)(stacked, x)
    assert calls.found == ["forward", "forward", "backward"]


CASES = {
    "plain": {},
    "float32, tiles": {"dtype": torch.float32, "hidden": 70, "batch": 17, "steps": 9},
    "float32, few rows": {"dtype": torch.float32, "hidden": 70, "batch": 6},
    "bfloat16": {"dtype": torch.bfloat16, "hidden": 33, "num_layers": 1},
    "one step": {"steps": 1, "batch": 1, "hidden": 33, "bidirectional": False},
    "one large step": {
        "steps": 2,
        "batch": 2,
        "hidden": 257,
        "num_layers": 1,
        "bidirectional": False,
        "dtype": torch.float32,
    },
    "no step": {"batch": 0},
}


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cell", ["relu", "gru", "lstm", "lstm-proj"])
def test_members_have_the_bits_that_they_have_alone(cell, case):
    """Whatever the number of threads."""
    options = dict(CASES[case])
    steps, batch = options.pop("steps", 5), options.pop("batch", 4)
    members, stacked, skeleton = ensemble(cell, **options)
    x = torch.randn(E, steps, batch, 3).to(members[0].weight_ih_l0.dtype)

    def results(module, parameters, x):
        y, state = functional_call(module, parameters, (x,))
        return sum(t.double().sin().sum() for t in (y, *flat(state))), (y, *flat(state))

    expected = []
    for member, own in zip(members, x, strict=True):
        leaf = own.clone().requires_grad_()
        loss, outputs = results(member, dict(member.named_parameters()), leaf)
        grads = torch.autograd.grad(loss, [leaf, *member.parameters()])
        expected.append([*outputs, *grads])
    both = vmap(grad(results, (2, 1), has_aux=True), (None, 0, 0))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            (dx, dweights), outputs = both(skeleton, stacked, x)
            inference = vmap(lambda p, x: functional_call(skeleton, p, (x,)))(stacked, x)
            for m, right in enumerate(expected):
                found = [t[m] for t in (*outputs, dx, *dweights.values())]
                assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
                outputs_alone = [t[m] for t in flat(inference)]
                assert all(torch.equal(a, b) for a, b in zip(outputs_alone, right, strict=False))
    finally:
        torch.set_num_threads(before)


def stacked_call(cell, shared=(), **kwargs):
    """Arguments of the forward op for each of E members, and the same stacked but for `shared`."""
    each = [test_ops.arguments(cell, **kwargs) for _ in range(E)]
    for call in each[1:]:
        call["weights"] = [w + torch.randn_like(w) for w in call["weights"]]
        call |= {name: each[0][name] for name in shared}

    def stack(*values):
        if isinstance(values[0], list):
            return [stack(*own) for own in zip(*values, strict=True)]
        return torch.stack(values)

    batched = {
        name: stack(*(call[name] for call in each))
        for name, value in each[0].items()
        if isinstance(value, (list, torch.Tensor)) and name not in (*shared, "batch_sizes")
    }
    return each, batched


def forward_and_backward(call, needs):
    """All results of both ops that are not empty, but the reserve."""
    y, hn, cn, reserve, hs, cs = ops.forward(*call.values())
    given = (y.cos(), hn.cos(), *(t.cos() if t.dim() > 1 else None for t in (cn, hs, cs)))
    rest = list(call.values())[:-1]
    *states, dweights = ops.backward(*given, y, reserve, hs, cs, needs, 0, *rest)
    return [t for t in (y, hn, cn, hs, cs, *states, *dweights) if t.dim() > 1 or t.numel()]


def check_ops(cell, shared, kwargs):
    each, batched = stacked_call(cell, shared, **kwargs)
    call = each[0]
    needs = [call[n] is not None for n in ("x", "hx", "cx")] + [True] * len(call["weights"])
    found = vmap(lambda own: forward_and_backward(call | own, needs))(batched)
    for m, own in enumerate(each):
        for a, b in zip(found, forward_and_backward(own, needs), strict=True):
            close(a[m], b)


SHARED = {
    "padded": ("x",),
    "lengths, mask": ("lengths", "hx"),
    "packed, mask": ("mask",),
    "everything": ("resets", "zone_h"),
}


@pytest.mark.parametrize("call", SHARED)
@pytest.mark.parametrize("cell", CELLS)
def test_the_ops_take_stacked_weights(cell, call):
    check_ops(cell, SHARED[call], test_ops.CALLS[call])


@pytest.mark.usefixtures("kernels_only")
def test_nesting():
    """Of samples and of members, outside and inside, and of weights that only some share."""
    members, stacked, skeleton = ensemble("lstm")
    x, state = torch.randn(2, 4, 2, 3).double(), random_state(members[0], 2)

    def loss(parameters, x):
        y, (h, c) = functional_call(skeleton, parameters, (x, state))
        return y.sin().sum() + h.square().sum() + c.cos().sum()

    first = {name: p[0] for name, p in stacked.items()}
    scaled = torch.arange(1, 3).double()  # of the biases: an outer ensemble

    def of_scaled(parameters, scale, x):
        grown = {n: p * scale if "bias" in n else p for n, p in parameters.items()}
        return grad(loss)(grown, x)

    outer = vmap(vmap(of_scaled, (0, None, None)), (None, 0, 0))(stacked, scaled, x)
    inner = vmap(vmap(of_scaled, (None, 0, 0)), (0, None, None))(stacked, scaled, x)
    apart = vmap(vmap(grad(loss), (0, None)), (None, 0))(stacked, x)
    for m in range(E):
        own = {name: p[m] for name, p in stacked.items()}
        for i in range(2):
            expected, plain = of_scaled_alone(loss, own, scaled[i], x[i]), grad(loss)(own, x[i])
            for name in own:
                close(outer[name][i, m], expected[name], name)
                close(inner[name][m, i], expected[name], name)
                close(apart[name][i, m], plain[name], name)
    some = {name: p for name, p in stacked.items() if "weight_hh" in name}
    found = vmap(lambda own, x: grad(loss)(first | own, x), (0, None))(some, x[0])
    for m in range(E):
        own = first | {name: p[m] for name, p in some.items()}
        for name, gradient in grad(loss)(own, x[0]).items():
            close(found[name][m], gradient, name)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_jacobian(cell):
    """Only the gradients are batched outside of the members: forward does not run again."""
    members, stacked, skeleton = ensemble(cell)
    x = torch.randn(E, 4, 2, 3).double()

    def sums(parameters, x, module):
        return functional_call(module, parameters, (x,))[0].sin().sum((0, 1))

    with Calls() as calls:
        found = jacrev(vmap(sums, (0, 0, None)))(stacked, x, skeleton)
    assert calls.found == ["forward", "backward"]
    for m, member in enumerate(members):
        own = {name: p[m] for name, p in stacked.items()}
        for name, alone in jacrev(sums)(own, x[m], member).items():
            close(found[name][m, :, m], alone, name)
            assert not found[name][m, :, m - 1].any()


def of_scaled_alone(loss, parameters, scale, x):
    grown = {n: p * scale if "bias" in n else p for n, p in parameters.items()}
    return grad(loss)(grown, x)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_second_derivatives(cell):
    """Autograd outside of vmap records an op with stacked weights."""
    members, stacked, skeleton = ensemble(cell, num_layers=1)
    x = torch.randn(2, 4, 1, 3, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(skeleton, parameters, (x,))[0].sin().sum()

    def penalty(parameters, of_samples):
        if of_samples:
            found = vmap(vmap(grad(loss), (None, 0)), (0, None))(parameters, x)
        else:
            each = [loss({n: p[m] for n, p in parameters.items()}, x[0]) for m in range(E)]
            if of_samples is None:
                each = [vmap(loss, (0, None))(parameters, x[0]).sum()]
            of_all = torch.autograd.grad(sum(each), list(parameters.values()), create_graph=True)
            return sum(g.square().sum() for g in of_all)
        return sum(g.square().sum() for g in found.values())

    def gradients(of_samples, parameters):
        leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
        value = penalty(leaves, of_samples)
        return torch.autograd.grad(value, list(leaves.values()))

    for a, b in zip(gradients(None, stacked), gradients(False, stacked), strict=True):
        close(a, b)
    found = gradients(True, stacked)
    for m, member in enumerate(members):
        parameters = list(member.parameters())
        each = [
            torch.autograd.grad(member(own)[0].sin().sum(), parameters, create_graph=True)
            for own in x
        ]
        value = sum(g.square().sum() for of_sample in each for g in of_sample)
        for a, b in zip(found, torch.autograd.grad(value, parameters), strict=True):
            close(a[m], b)


def test_what_the_ops_say_of_stacked_weights():
    call = test_ops.backward_arguments(cell="gru")
    forward = {n: v for n, v in call.items() if n in test_ops.arguments("gru")} | {"save": True}
    whole = torch.stack
    with pytest.raises(RuntimeError, match="ensemble that divides 4 rows, got 3"):
        ops.forward(*(forward | {"weights": [whole([w] * 3) for w in call["weights"]]}).values())
    some = [whole([w] * 2) for w in call["weights"][:3]] + call["weights"][3:]
    with pytest.raises(RuntimeError, match="expected bias_hh of shape"):
        ops.forward(*(forward | {"weights": some}).values())
    stacked = {"weights": [whole([w] * 2) for w in call["weights"]], "members": 1}
    with pytest.raises(RuntimeError, match="expected members of each of 2 weights, got 1"):
        ops.backward(*(call | stacked).values())
    for members in (0, 4):
        arguments = tuple((call | stacked | {"members": members}).values())
        torch.library.opcheck(ops.backward, arguments)
        *_, dweights = ops.backward(*arguments)
        assert dweights[0].shape == (members or 2, *call["weights"][0].shape)
