"""csrc/cuda/stepwise/cell_step.h in Python: its structures, field for field."""

from __future__ import annotations

import re
from ctypes import Structure, c_bool, c_int, c_int64, c_void_p

import torch

from . import ROOT

# The enumerations Cell, by torch.nn's names, and DType.
CELLS = re.findall(r'^CELL\("(\w+)"', (ROOT / "csrc/cells/cells.inc").read_text(), re.M)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class CellStep(Structure):
    _fields_ = (
        ("cell", c_int),
        ("dtype", c_int),
        ("batch", c_int64),
        ("hidden_size", c_int64),
        ("step", c_int64),
        ("steps", c_int64),
        ("lengths", c_void_p),
        ("reverse", c_bool),
    )


class CellForward(CellStep):
    _fields_ = (
        *(
            (name, c_void_p)
            for name in "gates_x gates_h b_ih b_hh h c operand y saved saved_c".split()
        ),
        *((name, c_int64) for name in "gates_x_stride gates_h_stride y_stride".split()),
    )


class CellBackward(CellStep):
    _fields_ = (
        *(
            (name, c_void_p)
            for name in "saved h h_prev c c_prev h0 c0 dy dh_product dh dc dgates hidden".split()
        ),
        *((name, c_int64) for name in "h_stride dy_stride".split()),
    )
