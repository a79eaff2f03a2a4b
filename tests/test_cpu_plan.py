"""How a CPU would divide a call, on any machine: csrc/plan/cpu_plan.h."""

from __future__ import annotations

import bindings
import pytest
from hypothesis import given
from hypothesis import strategies as st

# (least_rows, planes, weight_bytes, loads_quickly) of the dtypes that each variant computes
WIDE = {
    "float64": (1, 1, 8, True),
    "float32": (1, 1, 4, True),
    "bfloat16": (1, 1, 4, False),
    "float16": (1, 1, 4, True),
}
VARIANTS = {
    "amx": {"float32": (8, 3, 6, True), "bfloat16": (8, 1, 2, False)},
    "avx512bf16": {"bfloat16": (1, 1, 2, False)},
    "avx512": WIDE,
    "avx2": WIDE,
    "baseline": {**WIDE, "float16": (1, 1, 4, False)},
}
# What may run, best first.
MACHINES = {
    "amx": list(VARIANTS),
    "avx512": ["avx512", "baseline"],
    "avx2": ["avx2", "baseline"],
    "baseline": ["baseline"],
}


def costs(least_rows, planes, weight_bytes, loads_quickly):
    return bindings.CpuCosts(
        computes=True,
        tiled=least_rows > 1,
        least_rows=least_rows,
        planes=planes,
        weight_bytes=weight_bytes,
        loads_quickly=loads_quickly,
        words=False,
        deepest_integers=0,
    )


def make_machine(name: str = "avx512", **fields):
    def of(variant: str):
        found = {bindings.DType[d]: costs(*c) for d, c in VARIANTS[variant].items()}
        of_float32 = found.setdefault(bindings.DType.float32, bindings.CpuCosts())
        deepest = {"amx": 32768, "avx512bf16": 32768, "avx2": 8192}
        of_float32.deepest_integers = deepest.get(variant, 0)
        of_float32.words = variant in ("avx512", "avx2", "baseline")
        return bindings.CpuVariant(name=variant, costs=found)

    variants = [of(variant) for variant in MACHINES[name]]
    return bindings.CpuMachine(
        variants=variants, **{"tiles": True, "threads": 1, "l3_bytes": 32 << 20, **fields}
    )


def make_problem(
    mode: str, input_size: int, hidden_size: int, num_layers: int = 1, dtype="float32", **more
):
    return bindings.Problem(
        cell=bindings.Cell[mode],
        dtype=bindings.DType[dtype],
        input_size=input_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_directions=1,
        bias=True,
        **more,
    )


def make_request(steps: int, batch: int, **more):
    return bindings.CpuRequest(
        **{"steps": steps, "longest": steps, "batch": batch, "tokens": steps * batch, **more}
    )


def test_derivatives_in_a_direction_pack_their_weights():
    """Few tokens or not, and each thread takes its rows alone."""
    for backward in (False, True):
        for batch in (1, 4):
            given = [
                make_request(2, batch, backward=backward, tangent=tangent)
                for tangent in (False, True)
            ]
            problem, machine = make_problem("LSTM", 256, 700), make_machine("avx512", threads=4)
            plain, tangent = (bindings.plan_cpu(problem, request, machine) for request in given)
            assert plain.unpacked and not tangent.unpacked
            assert not tangent.pass_.unpacked_hh and tangent.members == 1


@given(
    machine=st.sampled_from(list(MACHINES)),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    hidden=st.integers(1, 600),
    layers=st.integers(1, 4),
    batch=st.integers(0, 300),
    steps=st.integers(0, 100),
    threads=st.integers(1, 64),
    backward=st.booleans(),
)
def test_a_plan_covers_the_batch(machine, dtype, hidden, layers, batch, steps, threads, backward):
    problem = make_problem("GRU", 5, hidden, layers, dtype)
    request = make_request(steps, batch, backward=backward)
    plan, fewer = (
        bindings.plan_cpu(problem, request, make_machine(machine, threads=n))
        for n in (threads, max(1, threads - 1))
    )
    used, rows, tasks, members = plan.threads, plan.rows_per_task, plan.tasks, plan.members
    assert 1 <= fewer.threads <= used <= threads
    assert (tasks - 1) * rows < batch <= tasks * rows if batch else tasks == 0
    if plan.unpacked:
        return
    # As it is packed; backward leaves room for the gradients of the gates.
    _, _, size, _ = VARIANTS[MACHINES[machine][plan.variant]][dtype]
    large = 3 * hidden * hidden * size > 2 << 20
    room = not backward or 64 * 3 * hidden * size <= 1 << 20
    assert rows <= (64 if dtype == "bfloat16" or (large and room) else 32)
    work = batch * steps * 3 * hidden * (5 + hidden + (layers - 1) * 2 * hidden + 8 * layers)
    assert used == 1 or used * 2**20 <= work
    assert members <= used and (members == 1 or large or (rows == 1 and tasks * members <= used))
    few = large and batch <= 16 * used and tasks * members <= used
    assert members == 1 or few or members**2 * 2**12 <= 3 * hidden * hidden


@pytest.mark.parametrize(
    ("members", "threads", "of_each", "tasks", "rows"),
    [
        (8, 2, 32, 8, 32),  # a thread takes whole members
        (2, 8, 32, 8, 8),  # four threads share the rows of each
        (3, 2, 5, 3, 5),
        (4, 1, 100, 16, 25),  # no more rows than states stay in L2
    ],
)
def test_rows_of_an_ensemble(members, threads, of_each, tasks, rows):
    """Each member is planned as it is alone, with its share of the threads."""
    machine, problem = make_machine(threads=threads), make_problem("GRU", 64, 256)
    request = make_request(35, members * of_each, ensemble=members)
    plan = bindings.plan_cpu(problem, request, machine)
    assert (plan.threads, plan.tasks, plan.rows_per_task) == (threads, tasks, rows)
    share = make_machine(threads=max(1, threads // members))
    alone = bindings.plan_cpu(problem, make_request(35, of_each), share)
    assert (alone.variant, alone.tasks * members) == (plan.variant, tasks)
    said = bindings.describe_cpu(plan, problem, request, machine)
    assert f"{members * of_each} batch rows of {members} members in {tasks} tasks" in said


def test_small_members_share_the_work_that_wakes_threads():
    problem, machine = make_problem("RNN_TANH", 8, 16), make_machine(threads=4)
    used = {n: bindings.plan_cpu(problem, make_request(35, n, ensemble=n), machine).threads
            for n in (1, 64, 256)}  # fmt: skip
    assert used == {1: 1, 64: 1, 256: 4}
    steps = bindings.plan_cpu(make_problem("GRU", 64, 256), make_request(1, 8, ensemble=8), machine)
    assert (steps.unpacked, steps.threads) == (True, 4)


# Which calls read weights unpacked: an LSTM of 256 units has 2 MB of weights, of 512 units 8 MB.
@pytest.mark.parametrize(
    ("hidden", "steps", "batch", "more", "expected"),
    [
        (256, 1, 1, {}, {"unpacked": True, "alternates": False, "prefetches": False}),
        (256, 1, 16, {}, {"unpacked": True, "prefetches": False}),
        (512, 1, 1, {}, {"unpacked": True, "prefetches": False}),
        (512, 1, 4, {}, {"unpacked": True, "prefetches": True}),
        (1024, 1, 1, {}, {"unpacked": True, "prefetches": True}),
        (1024, 1, 1, {"backward": True}, {"unpacked": True, "prefetches": False}),
        (256, 8, 2, {}, {"unpacked": True}),
        (256, 9, 2, {}, {"unpacked": False}),
        (256, 3, 16, {}, {"unpacked": True}),
        (256, 3, 17, {}, {"unpacked": False}),
        (256, 3, 16, {"backward": True}, {"unpacked": False}),
        (256, 1, 16, {"backward": True}, {"unpacked": True}),
        (512, 8, 2, {}, {"unpacked": False, "unpacked_hh": True}),
        (512, 1, 1, {}, {"unpacked": True, "alternates": True, "recurrent_first": True}),
        (512, 2, 1, {}, {"unpacked": True, "alternates": True, "recurrent_first": False}),
        (512, 1, 1, {"resets": True}, {"unpacked": False}),
        (512, 1, 1, {"recurrent_dropout": True}, {"unpacked": False}),
        (512, 1, 1, {"recurrent_dropout": True, "backward": True}, {"unpacked": True}),
        (512, 1, 1, {"zoneout": True}, {"unpacked": False}),
        (512, 1, 1, {"all_states": True}, {"unpacked": False}),
        (512, 1, 1, {"layer_norm": True}, {"unpacked": False, "unpacked_hh": False}),
        (512, 1, 1, {"one_hot": True}, {"unpacked": False}),
        (256, 8, 4, {}, {"unpacked_hh": True}),
        (256, 9, 4, {}, {"unpacked_hh": False}),
        (256, 64, 1, {}, {"unpacked_hh": False}),
        (1024, 64, 1, {}, {"unpacked_hh": True}),
        (1024, 64, 5, {}, {"unpacked_hh": False}),
    ],
)
def test_a_plan_of_few_tokens(hidden, steps, batch, more, expected):
    of_call = {"backward", "resets", "recurrent_dropout"}
    problem = make_problem(
        "LSTM", hidden, hidden, **{k: v for k, v in more.items() if k not in of_call}
    )
    request = make_request(steps, batch, **{k: v for k, v in more.items() if k in of_call})
    plan = bindings.plan_cpu(problem, request, make_machine())
    of_plan = {"unpacked", "recurrent_first"}
    for name, value in expected.items():
        assert getattr(plan if name in of_plan else plan.pass_, name) == value, name


@pytest.mark.parametrize(
    ("hidden", "dtype", "steps", "expected"),
    [
        (256, "float32", 1, (False, False, False)),
        (512, "float32", 1, (False, True, False)),
        (512, "float32", 3, (False, True, False)),
        (512, "float32", 50, (True, True, False)),  # W_hh alone, in both directions as if packed
        (256, "float32", 30, (True, False, False)),
        (512, "bfloat16", 1, (False, False, False)),
        (1024, "float32", 1, (False, True, True)),
    ],
)
def test_a_quick_l3_is_read_row_by_row(hidden, dtype, steps, expected):
    problem = make_problem("LSTM", hidden, hidden, dtype=dtype)
    made = bindings.plan_cpu(problem, make_request(steps, 1), make_machine(quick_l3=True)).pass_
    alternates, streams, prefetches = expected
    assert (made.alternates, made.streams, made.prefetches) == (alternates, streams, prefetches)
    for request, machine in ((make_request(steps, 1), make_machine()),
                             (make_request(steps, 2), make_machine(quick_l3=True))):  # fmt: skip
        assert not bindings.plan_cpu(problem, request, machine).pass_.streams


def variant(dtype: str, steps: int, batch: int, hidden: int = 64, **machine) -> str:
    """The variant that a machine with all of them takes."""
    problem, request = make_problem("LSTM", 64, hidden, dtype=dtype), make_request(steps, batch)
    plan = bindings.plan_cpu(problem, request, make_machine("amx", **machine))
    return MACHINES["amx"][plan.variant]


def test_each_dtype_has_the_best_variant_that_computes_it():
    assert variant("bfloat16", 9, 9) == "amx"
    assert variant("bfloat16", 9, 9, tiles=False) == "avx512bf16"
    assert variant("float16", 9, 9) == variant("float64", 9, 9) == "avx512"


def test_float32_is_multiplied_on_tiles_where_that_pays():
    assert variant("float32", 5, 16) == "amx"
    assert variant("float32", 4, 16) == "avx512"  # 64 tokens
    assert variant("float32", 100, 15) == "avx512"
    assert variant("float32", 5, 16, hidden=63) == "avx512"
    assert variant("float32", 5, 16, tiles=False) == "avx512"
    assert variant("float32", 17, 1, named=True) == "amx"
    assert variant("float32", 16, 1, named=True) == "avx512"  # unpacked in backward


def test_a_plan_in_words():
    problem, machine = make_problem("GRU", 5, 300), make_machine(threads=4)

    def words(steps, batch, **more):
        request = make_request(steps, batch, **more)
        plan = bindings.plan_cpu(problem, request, machine)
        return bindings.describe_cpu(plan, problem, request, machine)

    assert words(50, 64) == (
        "avx512, 4 of 4 threads: 64 batch rows in 4 tasks of up to 16 rows, each through all layers"
        " and steps by one thread"
    )
    assert words(1, 1) == (
        "avx512, 4 of 4 threads: hidden units divided among threads; weights read unpacked"
    )


def test_a_field_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="step"):
        bindings.CpuRequest(step=5)
    with pytest.raises(TypeError):
        bindings.CpuRequest(steps="5")


def stored_plan(machine: str, kind: str, steps: int, batch: int, width: int = 64, **fields):
    """(variant, product) of a call with weights in fewer bytes."""
    made = make_machine(machine, **fields)
    problem = make_problem("LSTM", width, 256, stored=bindings.Stored[kind])
    plan = bindings.plan_cpu(problem, make_request(steps, batch), made)
    text = bindings.describe_cpu(plan, problem, make_request(steps, batch), made)
    assert f"weights in {kind}" in text and not plan.unpacked and not plan.pass_.unpacked_hh
    return made.variants[plan.variant].name, plan.pass_.product.name


def test_weights_in_fewer_bytes():
    assert stored_plan("amx", "int8", 1, 1) == ("avx512bf16", "integers")
    assert stored_plan("amx", "int8", 35, 32) == ("amx", "integers")
    assert stored_plan("amx", "int8", 35, 32, tiles=False) == ("avx512bf16", "integers")
    # Sums of so many digits could exceed 32 bits.
    assert stored_plan("amx", "int8", 35, 32, width=40_000) == ("amx", "panels")
    assert stored_plan("amx", "int8", 1, 1, width=40_000) == ("avx512", "words")
    assert stored_plan("avx512", "int8", 9, 4) == ("avx512", "words")
    assert stored_plan("avx512", "int8", 9, 5) == ("avx512", "panels")
    assert stored_plan("avx2", "int8", 1, 1) == stored_plan("avx2", "int8", 9, 32)
    assert stored_plan("avx2", "int8", 9, 32) == ("avx2", "integers")
    assert stored_plan("avx2", "int8", 9, 32, width=8192) == ("avx2", "integers")
    assert stored_plan("avx2", "int8", 9, 32, width=8193) == ("avx2", "panels")
    assert stored_plan("avx2", "int8", 9, 4, width=8193) == ("avx2", "words")
    assert stored_plan("avx2", "bfloat16", 9, 4) == ("avx2", "words")
    assert stored_plan("amx", "bfloat16", 1, 1) == ("avx512", "words")
    assert stored_plan("amx", "bfloat16", 9, 5) == ("avx512bf16", "pairs")
    assert stored_plan("amx", "bfloat16", 9, 32) == ("amx", "pairs")
    assert stored_plan("avx512", "bfloat16", 9, 32) == ("avx512", "panels")
