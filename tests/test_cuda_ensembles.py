"""vmap over stacked weights on the CUDA side, emulated: members as slices of each launch's grid."""

import copy

import pytest
import test_ensembles
import test_ops
import torch
from cases import make_pair
from emulator.ops import instead_of_cpu, load
from test_batching import flat
from test_cuda_ops import BACKENDS, filled, precision  # noqa: F401
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import profile

import fusedrnn


@pytest.fixture
def plan(request, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with instead_of_cpu(seed=1):
        yield request.param


ON_STEPWISE = pytest.mark.parametrize("plan", ["stepwise"], indirect=True)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("plan", BACKENDS, indirect=True)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_matches_float64(plan, cell):
    """Members of one and of five rows, which end in the middle of a slice."""
    dtype = BACKENDS[plan][0]
    few = 1e-12 if dtype == torch.float64 else 1e-5
    for members, shared, bidirectional, batch in ((1, False, False, 2), (3, False, False, 5),
                                                  (3, True, True, 1)):  # fmt: skip
        pairs = [
            make_pair(cell, 3, 9, seed=seed, num_layers=2, bidirectional=bidirectional, dtype=dtype)
            for seed in range(members)
        ]
        stacked = {n: p.detach() for n, p in stack_module_state([f for _, f in pairs])[0].items()}
        skeleton = copy.deepcopy(pairs[0][1]).to("meta")
        x = torch.randn(*() if shared else (members,), 4, batch, 3, dtype=dtype)

        def results(parameters, x, module):
            y, state = functional_call(module, parameters, (x,))
            return sum(t.sin().sum() for t in (y, *flat(state))), (y, *flat(state))

        both = grad(results, (0, 1), has_aux=True)
        (dweights, dx), outputs = vmap(both, (0, None if shared else 0, None))(stacked, x, skeleton)
        for m, (plain, _) in enumerate(pairs):
            plain.double()
            leaf = (x if shared else x[m]).double().requires_grad_()
            loss, exact = results(dict(plain.named_parameters()), leaf, plain)
            grads = torch.autograd.grad(loss, [leaf, *plain.parameters()])
            found = [t[m] for t in (*outputs, dx, *dweights.values())]
            for ours, theirs in zip(found, (*exact, *grads), strict=True):
                assert (ours.double() - theirs).abs().max() <= few * max(1, theirs.abs().max())


@pytest.mark.usefixtures("filled")
@ON_STEPWISE
@pytest.mark.parametrize("call", test_ensembles.SHARED)
@pytest.mark.parametrize("cell", ["gru", "lstm-proj"])
def test_the_ops(plan, cell, call):
    test_ensembles.check_ops(cell, test_ensembles.SHARED[call], test_ops.CALLS[call])


def stacked_results(each, batched, needs):
    return vmap(lambda own: test_ensembles.forward_and_backward(each[0] | own, needs))(batched)


def call_kernels(cell, dtype):
    """Both ops once."""
    each, batched = test_ensembles.stacked_call(cell, kind="lengths", dtype=dtype)
    stacked_results(each, batched, [True, True, False] + [True] * len(each[0]["weights"]))


def check_members(each, batched, few):
    """Against the same kernels with each member's weights alone."""
    needs = [each[0][n] is not None for n in ("x", "hx", "cx")] + [True] * len(each[0]["weights"])
    needs[0] = each[0]["x"].is_floating_point()
    found = stacked_results(each, batched, needs)
    for m, own in enumerate(each):
        alone = test_ensembles.forward_and_backward(own, needs)
        for a, b in zip(found, alone, strict=True):
            assert (a[m] - b).abs().max() <= few * max(1, b.abs().max())


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("plan", ["stepwise", "cluster"], indirect=True)
@pytest.mark.parametrize("kind", test_ops.KINDS)
def test_integers_in_sixteen_bits(plan, kind, monkeypatch):
    """Each member gathers rows of its own W_ih, and adds up its own gradients of them."""
    monkeypatch.setattr(test_ops, "HIDDEN", 9)
    each, batched = test_ensembles.stacked_call("lstm", kind=kind, dtype=torch.bfloat16)
    for call in each:
        call["x"] = torch.randint(0, test_ops.INPUT, call["x"].shape[:-1])
    batched["x"] = torch.stack([call["x"] for call in each])
    check_members(each, batched, few=0.02)


@pytest.mark.usefixtures("filled")
@ON_STEPWISE
@pytest.mark.parametrize("cell", [fusedrnn.GRU, fusedrnn.LSTM])
def test_layer_norm(plan, cell):
    """Against the same kernels with each member's weights alone."""
    options = {"bidirectional": True, "layer_norm": True, "dtype": torch.float64}
    members = [cell(3, 5, 2, **options) for _ in range(3)]
    for p in (p for member in members for p in member.parameters()):
        torch.nn.init.normal_(p)
    stacked = {n: p.detach() for n, p in stack_module_state(members)[0].items()}
    skeleton, x = copy.deepcopy(members[0]).to("meta"), torch.randn(3, 4, 2, 3).double()

    def loss(parameters, x, module):
        y, state = functional_call(module, parameters, (x,))
        return sum(t.sin().sum() for t in (y, *flat(state)))

    found = vmap(grad(loss), (0, 0, None))(stacked, x, skeleton)
    for m, member in enumerate(members):
        alone = grad(loss)({n: p[m] for n, p in stacked.items()}, x[m], member)
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name][m], gradient, rtol=1e-10, atol=1e-11)


def launches(run):
    """Those of kernels, and products and sums of ATen."""
    before = load().launches()
    with profile() as seen:
        run()
    counted = ("aten::mm", "aten::bmm", "aten::sum")
    return load().launches() - before, sum(e.name in counted for e in seen.events())


@pytest.mark.parametrize("plan", ["stepwise", "grid"], indirect=True)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_members_share_each_launch(plan, cell):
    each, batched = test_ensembles.stacked_call(cell, dtype=BACKENDS[plan][0], kind="packed")
    needs = [each[0][n] is not None for n in ("x", "hx", "cx")] + [True] * len(each[0]["weights"])
    alone = launches(lambda: test_ensembles.forward_and_backward(each[0], needs))
    assert alone[0] > 0 < alone[1]
    assert launches(lambda: stacked_results(each, batched, needs)) == alone


@pytest.mark.slow  # more than 60 blocks of 256 threads
@pytest.mark.parametrize("plan", ["grid,engine=ffma_narrow,units=8,rows=2"], indirect=True)
def test_launches_take_rows_of_a_member_by_length(plan):
    """As test_cuda_ops.test_launches_take_rows_by_length, of two members with 70 rows each."""
    pairs = [make_pair("gru", 3, 9, seed=seed) for seed in range(2)]
    stacked, _ = stack_module_state([fused for _, fused in pairs])
    skeleton = copy.deepcopy(pairs[0][1]).to("meta")
    lengths, x = torch.randperm(140).view(2, 70) // 8 % 3 + 1, torch.randn(2, 3, 70, 3)

    def member(parameters, x, lengths):
        return functional_call(skeleton, parameters, (x,), {"lengths": lengths})[1]

    found = vmap(member)(stacked, x, lengths)
    for m, (plain, _) in enumerate(pairs):
        packed = pack_padded_sequence(x[m], lengths[m], enforce_sorted=False)
        torch.testing.assert_close(found[m], plain(packed)[1])
    assert load().longest_way() == 0  # of the last launch, whose rows have one step


@pytest.mark.usefixtures("filled")
@ON_STEPWISE
def test_wrong_arguments(plan):
    test_ensembles.test_what_the_ops_say_of_stacked_weights()
    each, _ = test_ensembles.stacked_call("gru", kind="packed")
    weights = [torch.stack([w] * 2) for w in each[0]["weights"]]
    with pytest.raises(RuntimeError, match="ensemble that divides 1 rows, got 2"):
        load().forward(*(each[0] | {"weights": weights}).values())


@pytest.mark.slow  # large matrices
@ON_STEPWISE
def test_large_products_where_tf32_is_permitted_to_recurrent_layers(plan, precision):  # noqa: F811
    """As in test_cuda_ops.py; a member's product is split by itself."""
    pairs = [make_pair("rnn", 1025, 64, seed=seed) for seed in range(2)]
    stacked = {n: p.detach() / 10 for n, p in stack_module_state([f for _, f in pairs])[0].items()}
    skeleton, x = copy.deepcopy(pairs[0][1]).to("meta"), torch.randn(2, 1, 2100, 1025)

    def loss(parameters, x):
        return functional_call(skeleton, parameters, (x,))[0].sum()

    found = {}
    for switch in ("ieee", "tf32"):
        precision(switch, "ieee")
        found[switch] = vmap(grad(loss))(stacked, x)["weight_ih_l0"]
    error = (found["tf32"] - found["ieee"]).norm(dim=(1, 2)) / found["ieee"].norm(dim=(1, 2))
    assert (error > 2e-6).all() and (error < 5e-5).all()


@pytest.mark.slow
@ON_STEPWISE
def test_large_products_that_are_split_by_depth(plan, precision):  # noqa: F811
    members = [make_pair("rnn", 4097, 16, seed=seed)[1] for seed in range(2)]
    with torch.no_grad():
        for member in members:
            member.weight_ih_l0.mul_(0.1)
    stacked = {n: p.detach() for n, p in stack_module_state(members)[0].items()}
    skeleton = copy.deepcopy(members[0]).to("meta")
    x = torch.randn(2, 1, 2100, 4097)
    precision("tf32", "ieee")
    with torch.no_grad():
        together = vmap(lambda p, x: functional_call(skeleton, p, (x,))[0])(stacked, x)
        for m, member in enumerate(members):
            torch.testing.assert_close(together[m], member(x[m])[0], rtol=1e-5, atol=1e-5)
