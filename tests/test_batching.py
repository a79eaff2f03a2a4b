"""torch.func.vmap of layers: the ops' batching rules, per-sample gradients, ensembles, masks."""

import copy

import pytest
import torch
from cases import CELLS, make_pair, random_state
from test_ops import B, T, arguments, backward_arguments
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn import batching, calls, ops, reference

LENGTHS = torch.tensor([[5, 2, 0], [1, 5, 3], [3, 3, 4], [0, 0, 0]])  # (members, B), T = 5


@pytest.fixture
def kernels_only(monkeypatch):
    """The plain implementation is not called."""
    monkeypatch.setattr(reference, "forward", None)


def close(found, expected, msg=None):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11, msg=msg)


def flat(result):
    """The tensors of a module's result."""
    return [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]


def make(cell, **kwargs):
    return make_pair(
        cell, 3, 4, **{"num_layers": 2, "bidirectional": True, "dtype": torch.float64} | kwargs
    )[1]


def states_of(module, members):
    """(members, L * D, B = 3, width) of h, and of an LSTM's c, as `hx`."""
    each = [random_state(module, 3, seed) for seed in range(members)]
    stacked = tuple(torch.stack(s) for s in zip(*each, strict=True))
    return stacked if module.mode == "LSTM" else stacked[0]


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", CELLS)
def test_each_argument_may_be_batched(cell):
    """Alone and together; the rest is shared."""
    module, members = make(cell), 4
    given = {
        "input": torch.randn(members, 5, 3, 3, dtype=torch.float64),
        "hx": states_of(module, members),
        "lengths": LENGTHS,
        "resets": torch.rand(members, 5, 3) < 0.3,
    }

    def one(of, m):
        """The argument of member m."""
        return torch.utils._pytree.tree_map(lambda t: t[m], of)

    for batched in (*given, "all"):
        names = list(given) if batched == "all" else [batched]
        shared = {name: one(value, 0) for name, value in given.items() if name not in names}

        def call(of_member, shared=shared):
            return flat(module(**shared, **of_member, return_all=True))

        found = vmap(call)({name: given[name] for name in names})
        for m in range(members):
            expected = call({name: one(given[name], m) for name in names})
            for a, b in zip(found, expected, strict=True):
                close(a[m], b, batched)


@pytest.mark.usefixtures("kernels_only")
def test_dimensions_chunks_and_nesting():
    module = make("lstm")
    x = torch.randn(5, 2, 3, 4, 3, dtype=torch.float64)  # T, 2 outer, B = 3, 4 inner, features
    expected = torch.stack(
        [torch.stack([module(x[:, i, :, j])[0] for j in range(4)], 1) for i in range(2)]
    )

    def inner(x, **kwargs):
        return vmap(lambda x: module(x)[0], in_dims=2, out_dims=1, **kwargs)(x)

    close(vmap(inner, in_dims=1)(x), expected)
    in_chunks = vmap(lambda x: inner(x, chunk_size=3), in_dims=1, out_dims=-1)(x)
    close(in_chunks, expected.movedim(0, -1))
    close(vmap(lambda x: module(x)[0], in_dims=-2)(x[:, 0]), expected[0].movedim(1, 0))


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", CELLS)
def test_packed_input(cell):
    """Its data may be batched, with and without a state; its sizes may not."""
    module, sizes = make(cell), torch.tensor([3, 2, 2, 1])
    data, hx = torch.randn(4, 8, 3, dtype=torch.float64), states_of(module, 4)

    def loss(parameters, data, *state):
        y, s = functional_call(module, parameters, (PackedSequence(data, sizes), *state))
        return y.data.sin().sum() + sum(t.square().sum() for t in flat(s))

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    for state in ((), (hx,)):
        found = vmap(grad(loss, (0, 1)), in_dims=(None, 0, *[0] * len(state)))(
            parameters, data, *state
        )
        for m in range(4):
            own = [torch.utils._pytree.tree_map(lambda t, m=m: t[m], s) for s in state]
            expected = grad(loss, (0, 1))(parameters, data[m], *own)
            for a, b in zip(flat(found), flat(expected), strict=True):
                close(a[m], b)
    with pytest.raises(ValueError, match="vmap cannot run over PackedSequences"):
        vmap(lambda d, s: module(PackedSequence(d, s))[0].data)(data, sizes.expand(4, -1))


# What a sample's loss is called with: (module's arguments, input, keyword arguments).
SAMPLES = {
    "padded": ({}, (4, 5, 3, 3), {}),
    "unbatched": ({}, (4, 5, 3), {}),
    "batch first": ({"batch_first": True}, (4, 3, 5, 3), {}),
    "lengths": ({}, (4, 5, 3, 3), {"lengths": LENGTHS}),
    "resets": ({}, (4, 5, 3, 3), {"resets": torch.arange(60).view(4, 5, 3) % 7 == 3}),
    "integers": ({}, (4, 5, 3), {"lengths": LENGTHS}),
    "no bias": ({"bias": False, "bidirectional": False}, (4, 5, 3, 3), {}),
    "one step": ({"num_layers": 1}, (4, 1, 1, 3), {}),
}


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients(cell, kind):
    options, shape, kwargs = SAMPLES[kind]
    module = make(cell, **options)
    if kind == "integers":
        x = torch.randint(0, 3, shape)
    else:
        x = torch.randn(shape, dtype=torch.float64)

    def loss(parameters, x, kwargs):
        y, state = functional_call(module, parameters, (x,), kwargs)
        return y.sin().sum() + sum(s.square().sum() for s in flat(state))

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, kwargs)
    for m in range(len(x)):
        own = {name: value[m] for name, value in kwargs.items()}
        tensors = list(module.parameters())
        expected = torch.autograd.grad(loss(dict(module.named_parameters()), x[m], own), tensors)
        for name, gradient in zip(parameters, expected, strict=True):
            close(found[name][m], gradient, f"{name} of {m}")


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_per_sample_gradients_of_layer_norm_and_recomputation(cell):
    module = make(cell, num_layers=1)
    normed = type(module)(3, 4, num_layers=2, layer_norm=True, recompute=True).double()
    x, parameters = torch.randn(6, 5, 3).double(), dict(normed.named_parameters())

    def loss(parameters, x):
        return functional_call(normed, parameters, (x,))[0].sin().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for m in range(6):
        expected = torch.autograd.grad(loss(parameters, x[m]), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            close(found[name][m], gradient, name)


def of_rows(full, member, members):
    """The backward op's arguments with gradients of one member's results only."""
    own = torch.arange(B) % members == member

    def masked(t):
        return None if t is None else torch.where(own[:, None], t, 0)

    names = ("grad_y", "grad_hn", "grad_cn")
    return full | {name: masked(full[name]) for name in names} | {"members": 0}


@pytest.mark.parametrize("call", [{"kind": "padded"}, {"kind": "lengths", "mask": True}])
@pytest.mark.parametrize("cell", CELLS)
def test_members_of_the_backward_op(cell, call):
    """Each member's gradients are those of its rows alone; other results stay."""
    full = backward_arguments(cell=cell, **call)
    dx, dhx, *_ = ops.backward(*full.values())
    for members in (1, 2, B):
        full["members"] = members
        if (cell, members) == ("lstm", 2):
            torch.library.opcheck(ops.backward, tuple(full.values()))
        again, again_hx, _, found = ops.backward(*full.values())
        assert torch.equal(dx, again)
        assert torch.equal(dhx, again_hx)
        for m in range(members):
            *_, expected = ops.backward(*of_rows(full, m, members).values())
            for a, b in zip(found, expected, strict=True):
                assert a.shape == (members, *b.shape)
                close(a[m], b)
    full["members"] = 3
    with pytest.raises(RuntimeError, match="expected members that divide 4 rows, got 3"):
        ops.backward(*full.values())


@pytest.mark.parametrize("cell", CELLS)
def test_members_and_threads_change_no_bit(cell):
    """Tasks are divided by threads and members; sums are not."""
    full = backward_arguments(cell=cell, dtype=torch.float32) | {"members": B}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.backward(*full.values())[3])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", CELLS)
def test_ensembles(cell):
    """Stacked weights, with an input for all or one each, and their gradients of each sample."""
    modules = [make(cell, seed=seed, batch_first=True) for seed in range(3)]
    stacked, _ = stack_module_state(modules)
    skeleton = copy.deepcopy(modules[0]).to("meta")
    stacked = {name: p.detach() for name, p in stacked.items()}
    x = torch.randn(3, 2, 5, 3, dtype=torch.float64)

    def call(parameters, x):
        return functional_call(skeleton, parameters, (x,))[0]

    close(vmap(call, (0, None))(stacked, x[0]), torch.stack([m(x[0])[0] for m in modules]))
    each = torch.stack([m(own)[0] for m, own in zip(modules, x, strict=True)])
    close(vmap(call)(stacked, x), each)

    def loss(parameters, sample):
        return call(parameters, sample).sin().sum()

    samples = vmap(vmap(grad(loss), (None, 0)))(stacked, x)  # of each member, of each sample
    inside_out = vmap(vmap(grad(loss), (0, 0)), (None, 1), 1)(stacked, x)
    for i, module in enumerate(modules):
        for j in range(2):
            value = module(x[i, j])[0].sin().sum()
            expected = torch.autograd.grad(value, list(module.parameters()))
            for name, gradient in zip(stacked, expected, strict=True):
                close(samples[name][i, j], gradient, name)
                close(inside_out[name][i, j], gradient, name)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", CELLS)
def test_only_gradients_are_batched(cell):
    """As in jacrev, and in vmap over a vjp: forward has run without members."""
    plain, fused = make_pair(cell, 3, 4, dtype=torch.float64)
    x, found = torch.randn(4, 2, 3, dtype=torch.float64), []
    for module in (plain, fused):
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        of_y = jacrev(lambda p, x, m=module: functional_call(m, p, (x,))[0], (0, 1))
        found.append(of_y(parameters, x))
    for a, b in zip(*map(flat, found), strict=True):
        close(b, a)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize(
    "kind", ["padded", "lengths", "packed", "all states", "zoneout", "normalised"]
)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm-proj"])
@pytest.mark.parametrize("frozen", [False, True])
def test_batched_gradients(cell, kind, frozen, monkeypatch):
    """One backward, which repeats what forward has saved where weights have gradients."""
    module = make(cell)
    options = {"zoneout": 0.3} if kind == "zoneout" else {}
    if kind == "normalised" and cell != "rnn":
        options = {"layer_norm": True}
    module = type(module)(3, 4, num_layers=2, bidirectional=True, dropout=0.5, **options).double()
    module.requires_grad_(not frozen)
    x = torch.randn(8, 3).double() if kind == "packed" else torch.randn(4, 3, 3).double()
    x.requires_grad_()
    given = PackedSequence(x, torch.tensor([3, 2, 2, 1])) if kind == "packed" else x
    hx = states_of(module, 1)
    hx = tuple(h[0] for h in hx) if type(hx) is tuple else hx[0]
    states = flat(hx) if frozen else []
    for h in states:
        h.requires_grad_()
    rows = {}
    if kind == "lengths":
        resets = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
        rows = {"lengths": torch.tensor([2, 4, 3]), "resets": resets}
    outputs = module(given, hx, return_all=kind == "all states", **rows)
    outputs = [t for t in flat(outputs) if t.requires_grad]
    grads = [torch.randn(3, *t.shape, dtype=torch.float64) for t in outputs]
    wanted = [x, *(states if frozen else module.parameters())]
    if frozen and kind != "all states":
        monkeypatch.setattr(batching._Fold, "repeated", None)
    found = torch.autograd.grad(outputs, wanted, grads, is_grads_batched=True, retain_graph=True)
    for m in range(3):
        own = [g[m] for g in grads]
        expected = torch.autograd.grad(outputs, wanted, own, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            close(a[m], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_share_what_forward_saved(dtype):
    """With the bits of rows that each have it; gradients of weights need it for each row."""
    torch.manual_seed(0)
    module = fusedrnn.LSTM(5, 24, 2, proj_size=9, bidirectional=True).to(dtype)
    x, hx, cx = (torch.randn(*s).to(dtype) for s in ((6, 4, 5), (4, 4, 9), (4, 4, 24)))
    stack = ("LSTM", 24, 9, 2, True, True, 0.0, 0.0, False, False)
    rest = (list(module._flat_weights), *calls.NO_OTHERS, 0.0, *stack)

    def rows(t):
        return t.repeat_interleave(3, 1)

    with torch.no_grad():
        y, _, _, reserve, *_ = ops.forward(x, hx, cx, *rest, True)
        all_y, _, _, all_reserve, *_ = ops.forward(rows(x), rows(hx), rows(cx), *rest, True)
        grad_y = torch.randn_like(all_y)
        needs = [True] * 3 + [False] * len(rest[0])

        def arguments(y, reserve, needs):
            call = (rows(x), rows(hx), rows(cx), *rest)
            return (grad_y, None, None, None, None, y, reserve, None, None, needs, 0, *call)

        found = ops.backward(*arguments(y, reserve, needs))
        expected = ops.backward(*arguments(all_y, all_reserve, needs))
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(a, b)
        torch.library.opcheck(ops.backward, arguments(y, reserve, needs))
        with pytest.raises(RuntimeError, match="the output of shape"):
            ops.backward(*arguments(y, reserve, [True] * len(needs)))


def test_batched_gradients_of_one_row():
    module = make("lstm", num_layers=2)
    x = torch.randn(3, 1, 3, dtype=torch.float64)
    rows = [
        torch.autograd.functional.jacobian(lambda x: module(x)[0][-1], x, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    close(*rows)


def test_batched_gradients_are_differentiable():
    """And the older vmap nests: its levels are folded one after the other."""
    from torch._vmap_internals import _vmap

    module = make("lstm", num_layers=1)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    forms = torch.randn(2, 4, *y.shape, dtype=torch.float64)

    def pull(form, graph):
        return torch.autograd.grad(y, x, form, retain_graph=True, create_graph=graph)[0]

    nested = _vmap(_vmap(lambda form: pull(form, False)))(forms)
    first = torch.autograd.grad(
        y, x, forms[0], is_grads_batched=True, create_graph=True, retain_graph=True
    )[0]
    (second,) = torch.autograd.grad(first.sin().sum(), x, retain_graph=True)
    each = torch.stack([pull(form, True) for form in forms[0]])
    close(first, each)
    close(second, torch.autograd.grad(each.sin().sum(), x, retain_graph=True)[0])
    for i in range(2):
        for j in range(4):
            close(nested[i, j], pull(forms[i, j], False))


def test_batched_gradients_nest_without_copies(monkeypatch):
    """Of frozen weights: each level's members share what forward saved."""
    from torch._vmap_internals import _vmap

    monkeypatch.setattr(batching._Fold, "repeated", None)
    module = make("lstm").requires_grad_(False)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    forms = torch.randn(2, 4, *y.shape, dtype=torch.float64)

    def pull(form):
        return torch.autograd.grad(y, x, form, retain_graph=True)[0]

    nested = _vmap(_vmap(pull))(forms)
    for i in range(2):
        for j in range(4):
            close(nested[i, j], pull(forms[i, j]))


@pytest.mark.usefixtures("kernels_only")
def test_only_gradients_are_batched_inside_of_batches():
    """A reserve of an outer rule cannot be repeated: forward runs again."""
    module, x = make("gru"), torch.randn(3, 4, 2, 3, dtype=torch.float64)
    found = vmap(jacrev(lambda x: module(x)[0]))(x)
    for m in range(3):
        close(found[m], torch.autograd.functional.jacobian(lambda x: module(x)[0], x[m]))


@pytest.mark.parametrize("cell", CELLS)
def test_reverse_over_reverse(cell):
    """Of losses of each sample too, whose gradients of weights are sums over a sample's rows."""
    module = make(cell)
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(parameters, sample, length):
        y, _ = functional_call(
            module, parameters, (sample.unsqueeze(1),), {"lengths": length.view(1)}
        )
        return y.sin().sum()

    lengths = torch.tensor([4, 0, 3])

    def penalty(parameters, batched):
        if batched:
            each = vmap(grad(loss), (None, 0, 0))(parameters, x, lengths)
            return sum(g.square().sum() for g in each.values())
        samples = [grad(loss)(parameters, *of) for of in zip(x, lengths, strict=True)]
        return sum(g.square().sum() for each in samples for g in each.values())

    found, expected = (grad(penalty)(parameters, batched) for batched in (True, False))
    along = jvp(lambda p: penalty(p, True), (parameters,), (direction,))[1]
    for name, gradient in expected.items():
        close(found[name], gradient, name)
    close(sum((found[name] * d).sum() for name, d in direction.items()), along)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    penalty(leaves, True).backward()  # plain autograd outside
    for name, leaf in leaves.items():
        close(leaf.grad, expected[name], name)


def test_forward_mode_of_the_backward_op():
    """Linear in gradients; through the plain implementation in what forward has read."""
    plain, fused = make_pair("lstm", 3, 4, num_layers=2, dtype=torch.float64)
    x, v = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    g, dg = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    expected = jvp(lambda x, g: vjp(lambda x: plain(x)[0], x)[1](g)[0], (x, g), (v, dg))[1]
    only_g = jvp(lambda g: vjp(lambda x: plain(x)[0], x)[1](g)[0], (g,), (dg,))[1]
    pull = vjp(lambda x: fused(x)[0], x)[1]
    close(jvp(lambda g: pull(g)[0], (g,), (dg,))[1], only_g)
    call = (x, None, None, [w.detach() for w in fused.parameters()], *[None] * 7, 0.0)
    call += fused._config()
    y, _, _, *made = ops.forward(*call, True)
    needs = [True] + [False] * 10
    with torch.autograd.forward_ad.dual_level():
        dual, dual_g = (torch.autograd.forward_ad.make_dual(t, d) for t, d in ((x, v), (g, dg)))
        dx, *_ = ops.backward(dual_g, *[None] * 4, y, *made, needs, 0, dual, *call[1:])
        close(torch.autograd.forward_ad.unpack_dual(dx).tangent, expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_outputs_may_be_written_in_place(cell):
    module, x = make(cell), torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(x, in_place):
        y, _ = module(x)
        y = y.mul_(2) if in_place else y * 2
        return y.sin().sum()

    close(grad(loss)(x, True), grad(loss)(x, False))


REGULARISED = {
    "dropout": {"dropout": 0.5},
    "recurrent dropout": {"recurrent_dropout": 0.5},
    "zoneout": {"zoneout": 0.5},
    "all": {"dropout": 0.5, "recurrent_dropout": 0.5, "zoneout": 0.5},
}


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("which", REGULARISED)
def test_randomness(which, shared):
    """As of torch.nn.Dropout: of members that share weights and of an ensemble of equal ones."""
    module = fusedrnn.LSTM(3, 8, num_layers=3, **REGULARISED[which])
    x = torch.randn(9, 2, 3)
    stacked, _ = stack_module_state([module] * 3)

    def member(parameters, _):
        return functional_call(module, parameters, (x,))[0]

    def run(randomness):
        dims = (None, 0) if shared else (0, 0)
        given = dict(module.named_parameters()) if shared else stacked
        return vmap(member, dims, randomness=randomness)(given, torch.zeros(3))

    same, different = run("same"), run("different")
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(different[a], different[b])
    with pytest.raises(RuntimeError, match="randomness error mode"):
        run("error")
    module.eval()
    assert torch.equal(run("error")[0], run("error")[1])


def test_masks_under_vmap_are_drawn_with_their_probability():
    module = fusedrnn.GRU(3, 40, num_layers=2, dropout=0.25)
    with torch.no_grad():  # h of the lower layer becomes 1, which the upper one adds up
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0[40:80] = -50.0  # z = 0: h is the candidate
        module.bias_ih_l0[80:] = 50.0
        module.bias_ih_l1[40:80] = -50.0
        module.weight_ih_l1[80:] = torch.eye(40)
    torch.manual_seed(0)
    y = vmap(lambda x: module(x)[0], randomness="different")(torch.randn(50, 10, 2, 3))
    kept = y > 0.5
    assert (y[kept] - torch.tensor(1 / 0.75).tanh()).abs().max() < 1e-5
    assert 0.74 < kept.float().mean() < 0.76  # of 40,000, whose deviation is 0.002
    assert (kept[0] != kept[1]).any()


def make_cell(name, nonlinearity):
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    torch.manual_seed(3)
    cell = getattr(fusedrnn, name)(3, 4, dtype=torch.float64, **options)
    plain = getattr(torch.nn, name)(3, 4, dtype=torch.float64, **options)
    plain.load_state_dict(cell.state_dict())
    return plain, cell


STEPS = [("RNNCell", "tanh"), ("RNNCell", "relu"), ("GRUCell", None), ("LSTMCell", None)]


@pytest.mark.parametrize(("name", "nonlinearity"), STEPS)
def test_single_steps(name, nonlinearity):
    plain, cell = make_cell(name, nonlinearity)
    x, h, c = (torch.randn(5, 2, w, dtype=torch.float64) for w in (3, 4, 4))
    hx = (h, c) if name == "LSTMCell" else h
    v = torch.randn_like(x[0])

    def first(module, x, *hx):
        return flat(module(x, *hx))[0]

    for given in ((x,), (x, hx)):
        for rows in (slice(None), 0):  # batched and unbatched
            own = torch.utils._pytree.tree_map(lambda t, rows=rows: t[:, rows], given)
            found = vmap(lambda *a: flat(cell(*a)))(*own)
            each = vmap(grad(lambda *a: flat(cell(*a))[0].sin().sum()))(*own)
            for m in range(5):
                one = torch.utils._pytree.tree_map(lambda t, m=m: t[m], own)
                for a, b in zip(found, flat(plain(*one)), strict=True):
                    close(a[m], b)
                leaf = one[0].clone().requires_grad_()
                first(plain, leaf, *one[1:]).sin().sum().backward()
                close(each[m], leaf.grad)
    for module in (plain, cell):
        close(jvp(lambda x, m=module: first(m, x), (x[0],), (v,))[1], first_tangent(plain, x[0], v))
    cells = [make_cell(name, nonlinearity)[1], cell]
    stacked, _ = stack_module_state(cells)
    ensemble = vmap(lambda p: first(lambda x: functional_call(cell, p, (x,)), x[0]))(stacked)
    close(ensemble, torch.stack([first(one, x[0]) for one in cells]))


def first_tangent(module, x, v):
    """A central difference is too coarse: the derivative of the first result by reverse mode."""
    x = x.clone().requires_grad_()
    y = flat(module(x))[0]
    form = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, form, create_graph=True)
    return torch.autograd.grad(dx, form, v)[0]


@pytest.mark.parametrize(("name", "nonlinearity"), STEPS)
def test_single_steps_say_what_is_wrong(name, nonlinearity):
    _, cell = make_cell(name, nonlinearity)
    x, h = torch.randn(5, 1, 1, 3), torch.randn(2, 4)
    hx = (h, h) if name == "LSTMCell" else h
    with pytest.raises(ValueError, match=f"{name}: Expected input to be 1D or 2D, got 4D"):
        grad(lambda x: flat(cell(x))[0].sum())(x)
    with pytest.raises(ValueError, match="to be 1D or 2D, got 3D"):
        grad(lambda h: flat(cell(x[0, 0], (h, h) if len(flat(hx)) == 2 else h))[0].sum())(x[0])
    with pytest.raises(RuntimeError, match="Expected hidden of the input's batch size"):
        grad(lambda x: flat(cell(x, hx))[0].sum())(torch.randn(3, 3, dtype=torch.float64))


def test_rules_of_infer():
    """The op that plain inference calls, under vmap itself."""
    names = ("x", "hx", "cx", "weights", *calls.Config._fields[:6])
    for cell in ("gru", "lstm"):
        call = {k: v for k, v in arguments(cell).items() if k in names}
        xs = torch.randn(3, T, B, call["x"].shape[-1], dtype=torch.float64)
        found = vmap(lambda x, call=call: ops.infer(*(call | {"x": x}).values())[:2])(xs)
        for m in range(3):
            expected = ops.infer(*(call | {"x": xs[m]}).values())[:2]
            for a, b in zip(found, expected, strict=True):
                close(a[m], b)


@pytest.mark.parametrize("cell", CELLS)
def test_hessians_by_two_reverse_passes(cell):
    """The outer one differentiates tensors of transforms that have ended."""
    plain, fused = make_pair(cell, 2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    expected, found = (
        jacrev(jacrev(lambda x, m=m: m(x)[0].sin().sum()))(x) for m in (plain, fused)
    )
    close(found, expected)
    assert found.abs().max() > 0
