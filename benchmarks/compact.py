"""JSON with one item a line: short files whose differences can be read."""

from __future__ import annotations

import json
from typing import Any

DIGITS = 6  # significant digits of a float; more would be noise


def dumps(value: Any, depth: int) -> str:
    """``value`` as JSON; lists and objects below ``depth`` levels take one line each."""
    return _lines(_rounded(value), depth, "") + "\n"


def _lines(value: Any, depth: int, indent: str) -> str:
    if depth == 0 or not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_lines(v, depth - 1, inner)}" for k, v in value.items()]
    else:
        items = [_lines(v, depth - 1, inner) for v in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return begin + ",".join(f"\n{inner}{item}" for item in items) + f"\n{indent}{end}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value
