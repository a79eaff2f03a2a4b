"""csrc/cuda/persistent/persistent.h in Python: its structures, field for field."""

from __future__ import annotations

import re
from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_void_p

from . import ROOT

ENGINES = ["ffma", "ffma narrow", "tf32", "half"]
HEADER = (ROOT / "csrc/plan/cuda_plan.h").read_text()
MAX_STAGES = int(re.findall(r"kMaxStages = (\d+)", HEADER)[0])


def pointers(names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names.split()]


class ForwardStage(Structure):
    _fields_ = (
        *pointers("w_hh b_ih b_hh gates_x w_ih mask h0 c0 hn cn y saved saved_c"),
        ("y_stride", c_int64),
        ("reverse", c_bool),
    )


class BackwardStage(Structure):
    _fields_ = (
        *pointers("w_hh saved saved_c y h0 c0 dy dy_mask w_ih dx dgates dhn dcn dh0 dc0"),
        ("y_stride", c_int64),
        ("dy_stride", c_int64),
        ("reverse", c_bool),
    )


class Shape(Structure):
    """What replay.cpp is asked for: it works out the rest, as csrc/plan/persistent.h does."""

    _fields_ = (
        ("team", c_int),
        ("units", c_int),
        ("rows", c_int),
        ("rest", c_int * (2 + 2 * 7 + 6)),
    )


class Persistent(Structure):
    _fields_ = (
        ("cell", c_int),
        ("layout", c_int * (3 + 1 + 2 * 4)),  # filled in by the launch; its two bools share a word
        ("dtype", c_int),
        ("engine", c_int),
        ("cluster", c_bool),
        ("chained", c_bool),
        ("stages", c_int),
        ("batch", c_int64),
        ("hidden_size", c_int64),
        ("steps", c_int64),
        ("lengths", c_void_p),
        ("offsets", c_void_p),
        ("mask_scale", c_float),
        ("shape", Shape),
        ("first_slice", c_int),
        ("slices", c_int),
        ("flags", c_void_p),
        ("workspace", c_void_p),
    )


class PersistentForward(Persistent):
    _fields_ = (("stage", ForwardStage * MAX_STAGES),)


class PersistentBackward(Persistent):
    _fields_ = (("stage", BackwardStage * MAX_STAGES),)


def offset(kind: type[Persistent], stage: int, name: str) -> int:
    """Where the pointer `name` of a stage lies in the structure."""
    of_stage = ForwardStage if kind is PersistentForward else BackwardStage
    array: int = kind.stage.offset
    at: int = getattr(of_stage, name).offset
    return array + stage * kind.stage.size // MAX_STAGES + at
