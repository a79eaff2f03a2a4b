"""The one rule by which numbers are judged.

The reference is torch.nn on the CPU in float64 with the same weights. Our error against it may be
at most twice torch.nn's in the same dtype. Where a tensor has many elements this is asked of the
root of the mean square. Where it has few, luck decides how near torch.nn comes, so the largest
error is compared, and may also be what rounding the inputs differently would have changed
(`noise`: the reference run again on inputs moved by an epsilon), which is how far any result in
this dtype can be trusted, and a few roundings of the largest value. What luck hides there,
test_numbers.test_small_tensors_on_average asks of many cases. The gradient of relu jumps where
rounding moves a sum across 0, and who meets such a point is luck too: `luck` admits the noise in
large tensors as well. float64 itself is compared directly, to 1e-12 of the tensor's largest value
and twice the noise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FACTOR = 2.0
MANY = 64
FEW_ROUNDINGS = 4.0
FLOAT64 = 1e-12

Results = dict[str, Tensor]


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def assert_as_exact_as_torch(
    ours: Results,
    theirs: Results,
    exact: Results,
    noise: Iterable[Results] = (),
    luck: bool = False,
) -> None:
    """Each of `ours` against the float64 `exact`, judged by torch.nn's own error in `theirs`."""
    noise = list(noise)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, reference in exact.items():
        a, b = ours[name], theirs[name]
        assert a.shape == b.shape == reference.shape, name
        assert a.dtype == b.dtype, name
        error, peer = a.double() - reference, b.double() - reference
        eps = torch.finfo(a.dtype).eps
        if a.dtype == torch.float64:
            trust = max((largest(other[name] - reference) for other in noise), default=0.0)
            found, bound = largest(error), FLOAT64 * largest(reference) + FACTOR * trust
        elif reference.numel() >= MANY:
            trust = max((rms(other[name] - reference) for other in noise if luck), default=0.0)
            found = rms(error)
            bound = FACTOR * (rms(peer) + trust) + eps / 2 * rms(reference)
        else:
            trust = max((largest(other[name] - reference) for other in noise), default=0.0)
            found = largest(error)
            bound = FACTOR * (largest(peer) + trust) + FEW_ROUNDINGS * eps * largest(reference)
        # Not `found > bound`: NaN must fail.
        assert found <= bound, f"{name}: {found:.3g} > {bound:.3g}, torch.nn's rms {rms(peer):.3g}"
