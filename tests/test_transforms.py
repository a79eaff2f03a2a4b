"""torch.func's transforms and forward mode: slow, through the reference, but right."""

import copy

import pytest
import torch
from cases import CELLS, make_pair
from torch.autograd import forward_ad


def pair(cell, seed=0):
    return make_pair(cell, 3, 4, seed, num_layers=2, bidirectional=True, dtype=torch.float64)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode(cell, frozen):
    x, v = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    tangents = []
    for module in pair(cell):
        module.requires_grad_(not frozen)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v))[0]).tangent
        tangents += [dual, torch.func.jvp(lambda x, m=module: m(x)[0], (x,), (v,))[1]]
    for tangent in tangents[1:]:
        torch.testing.assert_close(tangent, tangents[0], rtol=1e-11, atol=1e-12)
    assert tangents[0].abs().max() > 0


@pytest.mark.parametrize("cell", CELLS)
def test_grad_and_jacrev(cell):
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    plain, fused = pair(cell)
    for transform in (torch.func.grad, torch.func.jacrev):
        theirs, ours = (transform(lambda x, m=m: m(x)[0].sin().sum())(x) for m in (plain, fused))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_and_per_sample_gradients(cell):
    """torch.nn has no vmap: each sample is compared with itself alone."""
    _, fused = pair(cell)
    x = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    y = torch.func.vmap(lambda x: fused(x)[0])(x)
    torch.testing.assert_close(y, torch.stack([fused(one)[0] for one in x]))
    parameters = dict(fused.named_parameters())

    def loss(parameters, one):
        return torch.func.functional_call(fused, parameters, (one,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        expected = torch.autograd.grad(fused(one)[0].square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_an_ensemble_is_one_call(cell):
    """vmap over stacked weights, the module itself on the meta device."""
    modules = [pair(cell, seed)[1] for seed in range(3)]
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    stacked, buffers = torch.func.stack_module_state(modules)
    skeleton = copy.deepcopy(modules[0]).to("meta")

    def one(parameters, buffers):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))[0]

    found = torch.func.vmap(one)(stacked, buffers)
    torch.testing.assert_close(found, torch.stack([module(x)[0] for module in modules]))


@pytest.mark.parametrize("cell", CELLS)
def test_curvature_of_parameters(cell):
    """Hessians, and products with them, with respect to weights."""
    plain, fused = make_pair(cell, 2, 4, dtype=torch.float64)
    x, found = torch.randn(3, 2, 2, dtype=torch.float64), []
    for module in (plain, fused):
        weight = module.weight_hh_l0.detach()

        def loss(w, module=module):
            y = torch.func.functional_call(module, {"weight_hh_l0": w}, (x,))[0]
            return y.square().sum()

        found.append(
            {
                "hessian": torch.func.hessian(loss)(weight),
                "hvp": torch.autograd.functional.hvp(loss, weight, weight)[1],
                "vhp": torch.autograd.functional.vhp(loss, weight, weight)[1],
            }
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
    assert found[1]["hessian"].abs().max() > 0
