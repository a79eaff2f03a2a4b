"""Forward mode and second derivatives in the kernels: the ops, and what autograd makes of them."""

import pytest
import torch
from cases import make_pair, random_state
from test_ensembles import Calls
from test_ops import arguments as plain_arguments
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fusedrnn
from fusedrnn import calls, derivatives, ops, reference, tangents

pytestmark = pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")

CELLS = ["rnn", "relu", "gru", "lstm", "lstm-proj"]
NORMED = ["gru normed", "lstm normed", "lstm-proj normed"]  # with layer normalisation
RESETS = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]]).bool()


@pytest.fixture
def filled():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels_only(monkeypatch):
    """The plain implementation is not called."""
    monkeypatch.setattr(reference, "forward", None)


def close(found, expected, msg=None):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11, msg=msg)


def arguments(cell, **kwargs):
    call = plain_arguments(cell.removesuffix(" normed"), **kwargs)
    del call["save"]
    call["all_states"] = False
    return normed(call) if cell.endswith("normed") else call


def normed(call):
    """The same with layer normalisation. Its gains keep values away from the ends of tanh."""
    states = call["num_layers"] * (2 if call["bidirectional"] else 1)
    each, H, weights = len(call["weights"]) // states, call["hidden_size"], []
    for i in range(states):
        own = call["weights"][i * each : (i + 1) * each]
        gates = own[0].shape[0]
        vectors = (gates, gates, H, H) if call["mode"] == "LSTM" else (gates, gates)
        more = [0.5 + 0.5 * torch.rand(n).to(own[0]) for n in vectors]
        weights += [*own, *(m.requires_grad_(own[0].requires_grad) for m in more)]
    return call | {"weights": weights, "layer_norm": True}


def given(call, some="all", seed=4):
    """What forward made, tangents of what is differentiable, of forward's results random gradients
    and tangents of these.
    """
    torch.manual_seed(seed)
    call = calls.Call.of(*call.values())

    def like(t):
        return None if t is None or not t.is_floating_point() else torch.randn_like(t)

    direction = [like(t) for t in call.differentiable()]
    if some == "half":
        direction = [None if i % 2 else t for i, t in enumerate(direction)]
    if some == "weights":
        direction[:3] = [None] * 3
    if some == "input":
        direction[1:] = [None] * (len(direction) - 1)
    made, results = forward(call)
    u, du = ([like(t) if t.numel() else None for t in results] for _ in range(2))
    if some == "half":
        u[0] = u[3] = du[1] = du[4] = None
    return call, made, tuple(direction), tuple(u), tuple(du)


def forward(call):
    """What it leaves for backward, and its results."""
    y, hn, cn, reserve, hs, cs = ops.forward(*call.arguments(), True)
    return (y, reserve, hs, cs), (y, hn, cn, hs, cs)


def forward_tangent(call, made, direction):
    """The tangents of both."""
    v = tangents.direction_arguments(direction, made[0])
    results = tangents.forward_tangent(*v, *made, True, *call.arguments())
    dy, dhn, dcn, dreserve, dhs, dcs = results
    return (dy, dreserve, dhs, dcs), (dy, dhn, dcn, dhs, dcs)


def by_kernels(call, made, direction, u, du, members=0):
    """F' and B' as `plain_tangents` returns them."""
    v = tangents.direction_arguments(direction, made[0])
    needs = [t is not None and t.is_floating_point() for t in call.differentiable()]
    dmade, results = forward_tangent(call, made, direction)
    *states, dweights = tangents.backward_tangent(
        *u, *du, *v, *made, *dmade, needs, members, *call.arguments()
    )
    found = zip((*states, *dweights), needs, strict=True)
    return results, tuple(g if n else None for g, n in found)


def by_reference(call, made, direction, u, du, members=0):
    needs = [t is not None and t.is_floating_point() for t in call.differentiable()]
    given = tangents.TangentCall(u, du, direction, (), needs, members, call)
    return derivatives.plain_tangents(given)


def check_equal(found, expected, rtol=1e-11, atol=1e-12):
    for group, right in zip(found, expected, strict=True):
        for a, b in zip(group, right, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=atol)


CALLS = {
    "padded": ({"kind": "padded", "mask": True}, "all"),
    "lengths": ({"kind": "lengths", "mask": True}, "half"),
    "packed": ({"kind": "packed", "mask": True}, "all"),
    "no states, no bias": ({"kind": "padded", "states": False, "bias": False}, "input"),
    "weights": ({"kind": "padded"}, "weights"),
    "resets": ({"kind": "lengths"}, "all"),
    "integers": ({"kind": "lengths"}, "all"),
    "regularisers": ({"kind": "lengths", "mask": True, "changed": True}, "all"),
    "zoneout in evaluation": ({"kind": "packed", "changed": True}, "half"),
    "all states": ({"kind": "padded", "mask": True}, "all"),
    "all states, some of them": ({"kind": "lengths", "mask": True, "changed": True}, "half"),
    "all states, packed": ({"kind": "packed"}, "weights"),
}


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", [*CELLS, *NORMED])
def test_values(cell, name):
    kwargs, some = CALLS[name]
    call = arguments(cell, **kwargs)
    if name == "resets":
        call["resets"] = RESETS
    if name == "integers":
        call["x"] = torch.randint(2, call["x"].shape[:2])
    if name == "zoneout in evaluation":
        call |= {"zone_h": None, "zone_c": None, "h_mask": None, "resets": None}
    call["all_states"] = name.startswith("all states")
    call, made, direction, *_ = case = given(call, some)
    # 1 / sqrt(var + 1e-5) of equal units is 316, and its powers magnify rounding.
    check_equal(by_kernels(*case), by_reference(*case), rtol=1e-9 if cell in NORMED else 1e-11)
    v = tangents.direction_arguments(direction, made[0])
    again = tangents.forward_tangent(*v, *made, False, *call.arguments())
    assert torch.equal(again[0], by_kernels(*case)[0][0])  # kept or not
    assert again[3].shape[0] == 0


def long_call(cell, T, B, width, hidden, dtype):
    name = cell.removesuffix(" normed")
    _, module = make_pair(name, width, hidden, num_layers=2, bidirectional=True, dtype=dtype)
    states = (*random_state(module, B), None)[:2]
    tensors = (torch.randn(T, B, width, dtype=dtype), *states)
    call = dict(zip(("x", "hx", "cx"), tensors, strict=True))
    call["weights"] = [p.detach() for p in module.parameters()]
    call |= dict.fromkeys(f"other {i}" for i in range(calls.NON_DIFFERENTIABLE))
    call |= {"dropout": 0.0, **module._config()._asdict()}
    return normed(call) if name != cell else call


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", [*CELLS, *NORMED])
def test_odd_sizes_in_each_dtype(cell, dtype):
    """More rows than a task has, more tokens than a chunk, vectors with an end.

    The error may be twice that of the plain implementation in the same dtype, as everywhere; on
    the CPU the plain one rounds each product of 16 bits, so there it is the more exact. With layer
    normalisation one row, whose units are almost equal, may have most of a result's error: there
    the bound is for all results together.
    """
    exact_call = long_call(cell, 6, 37, 5, 33, torch.float64)
    exact_call["weights"] = [w.to(dtype).double() for w in exact_call["weights"]]
    for name in ("x", "hx", "cx"):
        t = exact_call[name]
        exact_call[name] = None if t is None else t.to(dtype).double()

    def low(t):
        if isinstance(t, (list, tuple)):
            return type(t)(low(one) for one in t)
        return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    call, _, direction, u, du = given(exact_call)
    direction, u, du = (low(low(group)) for group in (direction, u, du))
    wide = [tuple(None if t is None else t.double() for t in g) for g in (direction, u, du)]
    exact = by_reference(call, None, *wide)
    call = calls.Call(low(call.tensors), call.constants)
    found = by_kernels(call, forward(call)[0], direction, u, du)
    if dtype == torch.float64:
        return check_equal(found, exact, atol=1e-11)
    plain = by_reference(call, None, direction, u, du)
    eps, relative = torch.finfo(dtype).eps, []
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        for a, b, r in zip(ours, theirs, right, strict=True):
            if r is None or not r.numel():
                continue
            assert a.dtype == dtype
            error, peer, size = (
                t.detach().double().square().mean().sqrt() for t in (a - r, b - r, r)
            )
            if cell in NORMED:
                relative.append((error / size, peer / size))
            elif cell == "relu" and dtype != torch.float32:
                assert error < 0.1 * size  # rounding moves sums across 0
            else:
                assert error <= 2 * peer + eps / 2 * size
    if cell in NORMED:
        ours, theirs = (sum(each) / len(relative) for each in zip(*relative, strict=True))
        assert ours <= 2 * theirs + eps / 2
    return None


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("some", ["all", "input", "weights"])
def test_input_of_no_width(some):
    """An empty tensor is a tangent of zeros, and all that W_ih of no columns has."""
    call = long_call("gru", 3, 4, 2, 5, torch.float64)
    call["x"] = call["x"][..., :0]
    call["weights"] = [w[:, :0] if w.shape[1:] == (2,) else w for w in call["weights"]]
    case = given(call, some)
    check_equal(by_kernels(*case), by_reference(*case))


def backward_call(case, members):
    """The arguments of backward_tangent; the input needs no gradient."""
    call, made, direction, u, du = case
    v = tangents.direction_arguments(direction, made[0])
    with torch.no_grad():
        dmade, _ = forward_tangent(call, made, direction)
    needs = [False, *(t is not None for t in call.differentiable()[1:])]
    return (*u, *du, *v, *made, *dmade, needs, members, *call.arguments())


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("cell", "all_states"),
    [("gru", True), ("lstm", True), ("lstm", False), ("lstm-proj", False), ("lstm normed", False)],
)
def test_opcheck(cell, all_states):
    call = arguments(cell, kind="packed", mask=True, changed=True)
    call["all_states"] = all_states
    call, made, direction, *_ = case = given(call, "half")
    v = tangents.direction_arguments(direction, made[0])
    for save in (False, True):
        arguments_ = (*v, *made, save, *call.arguments())
        torch.library.opcheck(tangents.forward_tangent, arguments_)
    torch.library.opcheck(tangents.backward_tangent, backward_call(case, 0))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm"])
def test_opcheck_with_gradients(cell):
    """Traces the plain implementation, whose derivatives are a graph of a thousand nodes."""
    call = arguments(cell, grad=True)
    call, made, direction, u, du = given(call)
    v = tangents.direction_arguments(direction, made[0])
    made = tuple(t.detach() for t in made)
    torch.library.opcheck(tangents.forward_tangent, (*v, *made, True, *call.arguments()))
    u = tuple(g if g is None else g.requires_grad_() for g in u)
    case = (call, made, direction, u, du)
    torch.library.opcheck(tangents.backward_tangent, backward_call(case, 2))


@pytest.mark.parametrize("cell", [*CELLS, *NORMED])
def test_members(cell):
    """Weight gradients of each member's rows, by kernels and by the plain implementation."""
    call = arguments(cell, kind="packed")
    call["batch_sizes"] = torch.tensor([4, 2])
    call["x"] = call["x"][:6]
    case = given(call)
    expected = by_kernels(*case)[0], by_reference(*case, 2)[1]
    check_equal(by_kernels(*case, members=2), expected, 1e-10 if cell in NORMED else 1e-11)


@pytest.mark.parametrize("cell", ["lstm", "lstm normed", "lstm stacked"])
def test_threads_change_no_bit(cell, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_THREADS", "all")
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            call = long_call(cell.removesuffix(" stacked"), 5, 9, 3, 17, torch.float32)
            if cell.endswith("stacked"):
                call = stacked_weights(call, 3)
            found.append(by_kernels(*given(call)))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        for group, right in zip(found[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(group, right, strict=True))


def smooth(module, x, *states, **options):
    """A function of all results."""
    hx = (states if module.mode == "LSTM" else states[0]) if states else None
    y, state, *every = module(x, hx, **options)
    h = state[0] if module.mode == "LSTM" else state
    of_all = (t for of in every for ts in of if ts is not None for t in ts)
    return y.sin().sum() + h.square().sum() + sum(t.cos().sum() for t in of_all)


TRANSFORMS = {
    "jvp": lambda f, x, v: func.jvp(f, (x,), (v,)),
    "jacfwd": lambda f, x, v: func.jacfwd(f)(x),
    "hessian": lambda f, x, v: func.hessian(f)(x),
    "jvp of grad": lambda f, x, v: func.jvp(func.grad(f), (x,), (v,)),
    "grad of jvp": lambda f, x, v: func.grad(lambda x: func.jvp(f, (x,), (v,))[1])(x),
    "jacrev of jacrev": lambda f, x, v: func.jacrev(func.jacrev(f))(x),
    "vmap of hvp": lambda f, x, v: func.vmap(lambda x, v: func.jvp(func.grad(f), (x,), (v,))[1])(
        torch.stack([x, v]), torch.stack([v, x])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_transforms_run_in_kernels(cell, transform, monkeypatch):
    """Of a module whose parameters require gradients, as they do in training."""
    plain, fused = make_pair(cell, 2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, v = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    if transform == "vmap of hvp":  # which torch.nn's layers refuse
        both = ((x, v), (v, x))
        expected = torch.stack(
            [func.jvp(func.grad(lambda x: smooth(plain, x)), (a,), (b,))[1] for a, b in both]
        )
    else:
        expected = TRANSFORMS[transform](lambda x: smooth(plain, x), x, v)
    monkeypatch.setattr(reference, "forward", None)
    close(TRANSFORMS[transform](lambda x: smooth(fused, x), x, v), expected)


def test_linearize_runs_in_kernels(monkeypatch):
    """Which torch has for parameters that require no gradient."""
    plain, fused = make_pair("lstm", 2, 3, num_layers=2, dtype=torch.float64)
    x, v = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    expected = func.jvp(lambda x: smooth(plain, x), (x,), (v,))
    monkeypatch.setattr(reference, "forward", None)
    value, tangent = func.linearize(lambda x: smooth(fused.requires_grad_(False), x), x)
    close((value, tangent(v)), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_transforms_by_weights_run_in_kernels(cell, monkeypatch):
    plain, fused = make_pair(cell, 2, 3, dtype=torch.float64)
    x, results = torch.randn(4, 2, 2, dtype=torch.float64), []
    for module in (plain, fused):
        weight = {"weight_hh_l0": module.weight_hh_l0.detach()}

        def loss(weight, module=module):
            return func.functional_call(module, weight, (x,))[0].sin().sum()

        direction = {"weight_hh_l0": torch.ones_like(weight["weight_hh_l0"])}
        results.append(
            (
                func.hessian(loss)(weight)["weight_hh_l0"]["weight_hh_l0"],
                func.jvp(func.grad(loss), (weight,), (direction,))[1]["weight_hh_l0"],
            )
        )
        monkeypatch.setattr(reference, "forward", None)
    close(results[1], results[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_dual_numbers_run_in_kernels(cell, order, monkeypatch):
    """Also where a gradient is taken of them, while the level stands."""
    plain, fused = make_pair(cell, 2, 3, num_layers=2, dtype=torch.float64)
    x, v = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    found = []
    for module in (plain, fused):
        with forward_ad.dual_level():
            given = x.clone().requires_grad_(order == "reverse")
            dual = forward_ad.make_dual(given, v)
            value = smooth(module, dual)
            if order == "reverse":
                (value,) = torch.autograd.grad(value, dual)
            found.append(forward_ad.unpack_dual(value).tangent.detach())
        monkeypatch.setattr(reference, "forward", None)
    close(found[1], found[0])


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_penalties_run_in_kernels(cell, monkeypatch):
    plain, fused = make_pair(cell, 2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, found = torch.randn(4, 2, 2, dtype=torch.float64), []
    states = random_state(plain, 2)
    for module in (plain, fused):
        leaves = [t.clone().requires_grad_() for t in (x, *states)]
        first = torch.autograd.grad(smooth(module, *leaves), leaves, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        found.append([t.grad for t in (*leaves, *module.parameters())])
        monkeypatch.setattr(reference, "forward", None)
    close(found[1], found[0])


@pytest.mark.parametrize(
    "cell",
    [
        "rnn",
        "lstm",
        "lstm-proj",
        pytest.param("gru normed", marks=pytest.mark.slow),
        pytest.param("lstm normed", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_the_tangents(cell):
    """F' by kernels and further by kernels and the plain implementation."""
    call = arguments(cell, changed=cell == "lstm-proj")
    call["all_states"] = cell != "lstm"
    call, _, direction, *_ = given(call)

    def tangent(*tensors):
        inner = call.with_differentiable(tensors[: len(direction)])
        made = [t.detach() for t in forward(inner)[0]]
        v = tangents.direction_arguments(tensors[len(direction) :], made[0])
        dy, dhn, dcn, _, dhs, dcs = tangents.forward_tangent(*v, *made, False, *inner.arguments())
        return tuple(t for t in (dy, dhn, dcn, dhs, dcs) if t.numel())

    leaves = [
        None if t is None else t.clone().requires_grad_()
        for t in (*call.differentiable(), *direction)
    ]
    leaves = [t for t in leaves if t is not None]
    absent = [i for i, t in enumerate((*call.differentiable(), *direction)) if t is None]

    def of_given(*tensors):
        rest = iter(tensors)
        count = 2 * len(direction)
        return tangent(*(None if i in absent else next(rest) for i in range(count)))

    assert gradcheck(of_given, leaves, fast_mode=True, check_forward_ad=cell == "rnn")
    assert gradgradcheck(of_given, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_forward_over_forward(cell):
    plain, fused = make_pair(cell, 2, 3, dtype=torch.float64)
    x, v = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found = [
        func.jvp(lambda x, m=m: func.jvp(lambda x: smooth(m, x), (x,), (v,))[1], (x,), (v,))[1]
        for m in (plain, fused)
    ]
    close(found[1], found[0])
    cubes = [
        func.jacfwd(lambda x, m=m: func.jvp(func.grad(lambda x: smooth(m, x)), (x,), (v,))[1])(x)
        for m in (plain, fused)
    ]
    close(cubes[1], cubes[0])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("outer", ["vmap", "jvp"])
def test_ensembles(cell, outer, monkeypatch):
    """Stacked weights, inside of vmap and outside of it: one call of each op."""
    pairs = [make_pair(cell, 2, 3, seed, num_layers=2, dtype=torch.float64) for seed in range(3)]
    x, v = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    expected = torch.stack(
        [func.jvp(func.grad(lambda x, m=m: smooth(m, x)), (x,), (v,))[1] for m, _ in pairs]
    )
    stacked = func.stack_module_state([fused for _, fused in pairs])[0]
    skeleton = pairs[0][1]

    def loss(parameters, x):
        y, state = func.functional_call(skeleton, parameters, (x,))
        h = state[0] if cell == "lstm" else state
        return y.sin().sum() + h.square().sum()

    def gradients(x):
        return func.vmap(func.grad(loss, argnums=1), (0, None))(stacked, x)

    monkeypatch.setattr(reference, "forward", None)
    with Calls() as calls:
        if outer == "jvp":
            found = func.jvp(gradients, (x,), (v,))[1]
        else:
            found = func.vmap(
                lambda p: func.jvp(lambda x: func.grad(loss, argnums=1)(p, x), (x,), (v,))[1]
            )(stacked)
    close(found, expected)
    assert all(calls.found.count(op) == 1 for op in ("backward", "backward_tangent"))
    assert len(calls.found) <= 6


def stacked_weights(call, ensemble=2):
    """Row b has weights b % ensemble."""
    weights = [
        torch.stack([w + 0.1 * i * torch.randn_like(w) for i in range(ensemble)]).detach()
        for w in call["weights"]
    ]
    return call | {"weights": weights}


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(("kind", "members"), [("lengths", 0), ("padded", 4)])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm-proj", "lstm-proj normed"])
def test_stacked_weights(cell, kind, members):
    call = arguments(cell, kind=kind, mask=True, changed=not members)
    case = given(stacked_weights(call), "half" if members else "all")
    first = int(members > 0)  # the plain implementation of members has no F'
    check_equal(by_kernels(*case, members)[first:], by_reference(*case, members)[first:])


@pytest.mark.usefixtures("filled")
def test_one_of_stacked_weights():
    call = arguments("gru", kind="lengths")
    found = by_kernels(*given(stacked_weights(call, 1)))
    results, gradients = by_kernels(*given(call))
    check_equal(found[:1], [results])
    check_equal([[g[0] if i > 2 else g for i, g in enumerate(found[1])]], [gradients])


@pytest.mark.parametrize(
    ("cell", "changed"),
    [
        ("LSTM", {"proj_size": 2, "zoneout": (0.3, 0.4)}),
        ("LSTM", {"return_all": True}),
        ("LSTM", {"return_all": True, "proj_size": 2, "zoneout": (0.3, 0.4)}),
        ("GRU", {"return_all": True, "bidirectional": True}),
        ("RNN", {"return_all": True, "zoneout": 0.3}),
        ("GRU", {"layer_norm": True, "bidirectional": True}),
        ("LSTM", {"layer_norm": True, "return_all": True}),
        ("LSTM", {"layer_norm": True, "proj_size": 2, "zoneout": (0.3, 0.4)}),
    ],
)
def test_options_run_in_kernels(cell, changed, monkeypatch):
    options = {"dropout": 0.5, "recurrent_dropout": 0.5, **changed}
    return_all = options.pop("return_all", False)
    layer = getattr(fusedrnn, cell)(2, 3, num_layers=3, dtype=torch.float64, **options)
    x, v = torch.randn(2, 4, 2, 2, dtype=torch.float64)

    def run(x):
        return smooth(layer, x, return_all=return_all)

    def derivatives_of_layer():
        torch.manual_seed(3)  # of the masks
        tangent = func.jvp(run, (x,), (v,))[1]
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(run(leaf), leaf, create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), [leaf, *layer.parameters()])
        both = func.vmap(lambda v: func.jvp(func.grad(run), (x,), (v,))[1], randomness="same")(
            torch.stack([v, x])
        )
        return tangent, both, *second

    with monkeypatch.context() as plain:
        plain.setattr(tangents, "has_kernels", lambda call: False)
        expected = derivatives_of_layer()
    monkeypatch.setattr(reference, "forward", None)
    close(derivatives_of_layer(), expected)


@pytest.mark.usefixtures("kernels_only")
def test_outputs_may_be_written_between_the_derivatives():
    _, fused = make_pair("lstm", 2, 3)
    found = []
    for written in (False, True):
        x = torch.linspace(-1, 1, 16).view(4, 2, 2).requires_grad_()
        y, _ = fused(x)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        if written:
            with torch.no_grad():
                y.mul_(2)
        found.append(torch.autograd.grad(dx.square().sum(), list(fused.parameters())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_batched_second_gradients():
    """is_grads_batched, which only the plain implementation knows."""
    plain, fused = make_pair("gru", 2, 3, dtype=torch.float64)
    found = []
    for module in (plain, fused):
        x = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 2, 2).requires_grad_()
        (dx,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
        forms = torch.eye(16, dtype=torch.float64).view(16, *x.shape)
        found.append(torch.autograd.grad(dx, x, forms, is_grads_batched=True)[0])
    close(found[1], found[0])


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """torch.autograd.grad of the input of a layer in training computes no weight gradients."""
    seen, run = [], ops.call_below_autograd

    def below(op, *given):
        if op is ops.backward:
            seen.append(list(given[calls.RESULTS + 4]))
        return run(op, *given)

    monkeypatch.setattr(ops, "call_below_autograd", below)
    _, fused = make_pair("gru", 3, 40)
    x = torch.randn(60, 2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(fused(x)[0].sum(), x)
    fused(x)[0].sum().backward()
    assert torch.equal(x.grad, dx)
    (dw,) = torch.autograd.grad(fused(x * 1)[0].sum(), fused.weight_ih_l0)
    assert torch.equal(dw, fused.weight_ih_l0.grad)
    weights = [True] * 4
    assert seen == [
        [True, False, False, *[False] * 4],
        [True, False, False, *weights],
        [False, False, False, True, False, False, False],
    ]


def test_wrong_arguments():
    call = arguments("lstm")
    call["all_states"] = True
    call, made, direction, u, du = given(call)
    v = tangents.direction_arguments(direction, made[0])

    def run(*changed, made=made):
        return tangents.forward_tangent(*changed, *made, True, *call.arguments())

    with pytest.raises(RuntimeError, match="expected the tangent of the input of shape"):
        run(v[0][:-1], *v[1:])
    with pytest.raises(RuntimeError, match="the tangent of hx has another dtype"):
        run(v[0], v[1].float(), *v[2:])
    with pytest.raises(RuntimeError, match="expected the tangent of a weight of shape"):
        run(*v[:3], [v[3][1], *v[3][1:]])
    with pytest.raises(RuntimeError, match="tangents of weights, got 1"):
        run(*v[:3], v[3][:1])
    with pytest.raises(RuntimeError, match="expected cs of shape .*, got none"):
        run(*v, made=(*made[:3], None))
    dy, _, _, dreserve, *states = run(*v)
    needs = [True] * len(direction)
    for dmade, error in (
        ((dy, dreserve[:-1], *states), "expected the reserve of shape"),
        ((dy, dreserve, states[0][:, :-1], states[1]), "expected hs of shape"),
    ):
        with pytest.raises(RuntimeError, match=error):
            tangents.backward_tangent(*u, *du, *v, *made, *dmade, needs, 0, *call.arguments())
