"""What a GPU would be asked to run, as far as that follows from shape and device."""

from __future__ import annotations

import itertools
import re

import bindings
import pytest
import torch
from compiling import ROOT
from hypothesis import given
from hypothesis import strategies as st

import fusedrnn
from benchmarks import plans
from fusedrnn import _C, cuda, families

CELLS = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM")
# Clusters of up to 8 blocks, and less than half an H200's shared memory.
SMALL = cuda.Spec(
    capability=120, processors=170, shared_bytes=101376, clusters=(170, 85, 56, 42, 34, 28, 24, 21)
)
DEVICES = {**plans.DEVICES, "small": SMALL}


def plan(
    mode="LSTM", dtype="float32", hidden=256, proj=0, layers=1, bidirectional=False, steps=35,
    batch=32, backward=False, tf32=False, device="H200", forced="", layer_norm=False,
    members=1,
):  # fmt: skip
    spec = DEVICES[device] if isinstance(device, str) else device
    problem = bindings.Problem(
        cell=bindings.Cell[mode],
        dtype=bindings.DType[dtype],
        hidden_size=hidden,
        proj_size=proj,
        num_layers=layers,
        num_directions=2 if bidirectional else 1,
        layer_norm=layer_norm,
    )
    request = bindings.CudaRequest(
        steps=steps, batch=batch, backward=backward, tf32=tf32, members=members
    )
    return bindings.plan_cuda(problem, request, bindings.DeviceSpec(**spec), forced)


def backend(**shape) -> str:
    return plan(**shape).backend.name


@given(
    mode=st.sampled_from(CELLS),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    hidden=st.integers(1, 3000),
    layers=st.integers(1, 20),
    bidirectional=st.booleans(),
    steps=st.integers(1, 100_000),
    batch=st.integers(1, 5000),
    backward=st.booleans(),
    tf32=st.booleans(),
    device=st.sampled_from(sorted(DEVICES)),
)
def test_every_shape_has_a_plan_that_fits(device, **shape):
    spec = DEVICES[device]
    p = plan(device=device, **shape)
    if p.backend.name == "stepwise":
        return
    s = p.shape
    stages = p.layers * (2 if shape["bidirectional"] else 1)
    assert shape["dtype"] != "float64"
    assert s.shared_bytes <= spec["shared_bytes"]
    assert s.units * s.rows <= 256 and s.units * s.team >= shape["hidden"]
    assert s.units * (s.team - 1) < shape["hidden"], "a block without units"
    assert s.rows * p.slices >= shape["batch"] and 1 <= p.at_once <= p.slices
    assert stages <= 16 and p.layers <= shape["layers"]
    if p.backend.name == "cluster":
        assert spec["capability"] >= 90 and 2 <= s.team <= 16
        # A processor has 1 KiB more than a block may ask for; each block takes that much beside.
        assert 2 * (s.shared_bytes + 1024) > spec["shared_bytes"] + 1024, "two on a processor"
        if p.layers > 1:
            assert p.at_once * stages <= spec["clusters"][s.team - 1]
    elif s.team > 1 or p.layers > 1:
        assert p.at_once * stages * s.team <= spec["processors"]
    else:  # blocks that do not wait for each other
        assert p.at_once == p.slices


def test_layers_in_both_directions_do_not_chain():
    assert plan(layers=4, bidirectional=True).layers == 1
    assert plan(layers=4).layers == 4


def test_what_has_no_persistent_kernel():
    assert backend(dtype="float64") == "stepwise"
    assert backend(proj=64) == backend(layer_norm=True) == "stepwise"
    older = plans.DEVICES["T4"] | {"capability": 70}
    assert backend(device=older) == "stepwise"
    assert backend(device="A100") == "grid"


def test_turing_has_ffma_alone():
    """Its tensor cores multiply neither TF32 nor bfloat16, nor float16 as our kernels do."""
    for mode in CELLS:
        for shape in ({"hidden": 64}, {"hidden": 192}, {"hidden": 192, "backward": True}):
            for tf32 in (False, True):
                p = plan(mode, device="T4", tf32=tf32, **shape)
                assert p.backend.name == "grid" and "FFMA" in str(p)
            for dtype in ("bfloat16", "float16", "float64"):
                assert backend(mode=mode, device="T4", dtype=dtype, **shape) == "stepwise"
    with pytest.raises(ValueError, match="FUSEDRNN_PLAN=grid cannot run"):
        plan(device="T4", dtype="float16", forced="grid")


def test_a_gpu_without_room_for_clusters():
    """As many as the driver says run at once, 0 where none of a size can."""
    none = plans.DEVICES["H200"] | {"clusters": (0,) * 16}
    assert backend(device=none) == "grid"
    few = plans.DEVICES["H200"] | {"clusters": (132, 66)}
    assert plan(device=few).shape.team <= 2 or backend(device=few) == "grid"


def test_plans_do_not_fall_off_a_cliff():
    """With one cluster of each size fewer, or a group fewer, than an H200 is expected to have."""
    h200 = plans.DEVICES["H200"]
    fewer = (
        tuple(count - 1 for count in h200["clusters"]),
        (132, 66, *(7 * (16 // n) for n in range(3, 17))),
        plans.DEVICES["H200, 7 clusters of 16"]["clusters"],
    )
    for mode, dtype, hidden, layers, batch, backward in itertools.product(
        ("LSTM", "RNN_TANH"), ("float32", "bfloat16"), (128, 257, 512, 768), (1, 2, 3), (8, 33, 64),
        (False, True),
    ):  # fmt: skip
        shape = {"mode": mode, "dtype": dtype, "hidden": hidden, "layers": layers}
        shape |= {"batch": batch, "backward": backward, "steps": 100}
        expected = plan(**shape)
        for clusters in fewer:
            found = plan(**shape, device=h200 | {"clusters": clusters})
            assert found.microseconds <= 1.5 * expected.microseconds, (shape, str(found))


def test_a_struck_family_is_not_planned(monkeypatch):
    """Nor is one of the same exchange that is still to be struck."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.delenv("FUSEDRNN_PLAN", raising=False)
    names = {f.number: f for f in families.cuda_families()}
    spec, seen = dict(plans.DEVICES["H200"]), []
    problem = bindings.Problem(
        cell=bindings.Cell.GRU, dtype=bindings.DType.float32, hidden_size=256, num_layers=2,
        num_directions=1,
    )  # fmt: skip
    request = bindings.CudaRequest(steps=35, batch=32, backward=True)
    config = fusedrnn.GRU(3, 256, 2)._config()
    struck: tuple[int, ...] = ()
    while True:
        device = bindings.DeviceSpec(**spec, struck=list(struck))
        try:
            expected = str(bindings.plan_cuda(problem, request, device))
        except ValueError as error:
            assert "refused or found wrong" in str(error)
            break
        found = cuda.plan(config, torch.float32, 35, 32, True, plans.DEVICES["H200"], struck)
        assert found.text == expected and found.family not in struck
        family = names[found.family]
        assert (family.mode, family.backward) == ("GRU", True)
        seen.append(family.exchange)
        struck += (found.family,)
    assert seen[0] == "cluster" and seen[-1] == "stepwise" and "grid" in seen


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "mode, dtype, tf32, hidden",
    [
        *((mode, "float32", False, 1) for mode in CELLS),
        ("RNN_TANH", "float32", False, 32),
        ("RNN_TANH", "float32", True, 16),
        ("LSTM", "bfloat16", False, 8),
        ("GRU", "float16", False, 8),
        ("RNN_TANH", "bfloat16", False, 128),
        ("LSTM", "bfloat16", False, 64),
        ("GRU", "float32", True, 64),
        ("LSTM", "float32", False, 33),
    ],
)
def test_small_layers_take_a_block(mode, dtype, tf32, hidden, backward):
    """No cluster, which needs two: a block that exchanges nothing, on every kind of GPU."""
    for device in DEVICES if dtype == "float32" else set(DEVICES) - {"T4"}:
        shape = {"mode": mode, "dtype": dtype, "tf32": tf32, "hidden": hidden}
        p = plan(**shape, batch=8, backward=backward, device=device)
        assert (p.backend.name, p.shape.team, p.at_once) == ("grid", 1, p.slices)
        assert "teams of one block of" in str(p)


def test_a_large_batch_of_a_small_layer_is_one_launch():
    p = plan(hidden=16, batch=5000)
    assert p.shape.team == 1 and p.at_once == p.slices > 132


def test_rows_of_a_slice_belong_to_one_member():
    alone = plan(hidden=16, batch=8, forced="grid,rows=8")
    assert alone.slices == 1
    assert plan(hidden=16, batch=24, forced="grid,rows=8", members=3).slices == 3
    assert plan(hidden=16, batch=24, forced="grid,rows=8", members=2).slices == 4


def test_a_plan_can_be_forced():
    p = plan(forced="grid,units=8,rows=8,layers=1", layers=3)
    assert (p.backend.name, p.shape.units, p.shape.rows, p.layers) == ("grid", 8, 8, 1)
    assert backend(forced="stepwise") == "stepwise"
    assert backend(forced="cluster") == "cluster"


def test_a_plan_can_be_forced_for_one_direction():
    forced = "grid,rows=8;backward:units=8;forward:units=16,layers=1"
    forward, backward = (plan(forced=forced, backward=way, layers=2) for way in (False, True))
    assert (forward.shape.units, forward.shape.rows, forward.layers) == (16, 8, 1)
    assert (backward.shape.units, backward.shape.rows) == (8, 8)
    assert forward.backend.name == backward.backend.name == "grid"


def test_an_engine_can_be_forced():
    assert plan(forced="engine=ffma_narrow").engine.name == "ffma_narrow"
    assert plan(forced="engine=ffma", tf32=True).engine.name == "ffma"
    assert plan(forced="engine=half", dtype="float16").engine.name == "half"


def listed(forced="", model=None, device="H200", **shape):
    """All plans of the compiled module: [(FUSEDRNN_PLAN, microseconds)]."""
    shape = {
        **{"mode": "LSTM", "dtype": "float32", "hidden_size": 256, "num_layers": 2},
        **{"bidirectional": False, "steps": 35, "batch": 32, "backward": False, "tf32": False},
        **{"proj_size": 0, **shape},
    }
    return _C.cuda_plans(
        **shape, device=DEVICES[device], forced=forced, model=model or _C.cuda_model()
    )


@pytest.mark.parametrize("backward", [False, True])
def test_every_plan_has_words_that_force_it(backward):
    plans = listed(backward=backward)
    assert len({text for text, _ in plans}) == len(plans) > 50
    assert [us for _, us in plans] == sorted(us for _, us in plans)
    for text, us in plans[::11]:
        assert listed(text, backward=backward) == [(text, us)]
        made = plan(forced=text, layers=2, backward=backward)
        assert made.microseconds == pytest.approx(us)
    best = plan(layers=2, backward=backward)
    assert plans[0][1] == best.microseconds and f"units={best.shape.units}," in plans[0][0]


def test_the_model_is_data():
    """A GPU on which clusters exchange slowly would have another plan."""
    slow = {**_C.cuda_model(), "cluster_exchange": 1e5}
    assert listed()[0][0].startswith("cluster,") and listed(model=slow)[0][0].startswith("grid,")
    with pytest.raises(TypeError, match="missing argument 'cell'"):
        listed(model={name: x for name, x in slow.items() if name != "cell"})


@pytest.mark.parametrize(
    "forced, message",
    [
        ("engine=half", "cannot run this shape"),  # of float32
        ("engine=tf32", "cannot run this shape"),  # not permitted
        ("engine=fast", "has 'engine=fast'; it takes"),
        ("forward:cluster;backward:clutser", "has 'clutser'"),  # whichever direction is asked for
        ("clutser", "has 'clutser'; it takes one of stepwise, grid and cluster"),
        ("grid,units", "has 'units'"),
        ("grid,units=-8", "has 'units=-8'"),
        ("rows=8x", "has 'rows=8x'"),
        ("grid,units=6", "cannot run this shape on this device"),
        ("cluster,rows=4000", "cannot run this shape"),
        ("cluster,units=256", "cannot run this shape"),  # a block alone is no cluster
    ],
)
def test_a_plan_that_cannot_be(forced, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(forced=forced)


def test_cluster_cannot_be_forced_where_there_are_none():
    with pytest.raises(ValueError, match="FUSEDRNN_PLAN=cluster cannot run"):
        plan(device="A100", forced="cluster")


def test_the_table_in_the_docs_is_of_these_plans():
    assert (ROOT / "docs/plans.md").read_text() == plans.table()


@pytest.mark.parametrize(
    "archs, capability, covered",
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # machine code runs on later GPUs of the same major version
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (12, 1), True),
        ("9.0+PTX", (8, 9), False),
        ("7.5", (7, 5), True),
        ("7.5", (7, 0), False),
        ("7.5", (8, 0), False),
        ("7.5;8.0;9.0a;10.0;12.0+PTX", (8, 9), True),
        ("8.0;8.6;8.9;9.0a;10.0;12.0+PTX", (7, 5), False),
        ("8.0;8.6;8.9;9.0a;10.0;12.0+PTX", (13, 0), True),
        ("8.0;8.6;8.9;9.0a;10.0;12.0+PTX", (11, 0), False),
    ],
)
def test_which_gpus_a_binary_covers(archs, capability, covered):
    assert cuda.covers(tuple(archs.split(";")), *capability) == covered


def test_a_plan_in_words(monkeypatch):
    config, spec = fusedrnn.GRU(3, 256)._config(), plans.DEVICES["H200"]
    monkeypatch.delenv("FUSEDRNN_PLAN", raising=False)
    assert cuda.plan(config, torch.float64, 5, 6, False, spec).text == "stepwise"
    assert cuda.plan(config, torch.bfloat16, 5, 6, False, spec).text.startswith("cluster: ")
    monkeypatch.setenv("FUSEDRNN_PLAN", "grid")
    assert cuda.plan(config, torch.bfloat16, 5, 6, False, spec).text.startswith("grid: ")
    monkeypatch.setenv("FUSEDRNN_PLAN", "fastest")
    with pytest.raises(ValueError, match="FUSEDRNN_PLAN has 'fastest'"):
        cuda.plan(config, torch.float32, 5, 6, False, spec)
