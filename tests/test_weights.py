"""Parameters in every form that torch has for them, besides those of test_modules.py."""

import copy
import warnings

import pytest
import torch
from cases import CELLS, make_pair, random_state
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn

# torch.ao.quantization is deprecated as a whole; torch's own spectral_norm function too.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def stack(cell):
    return make_pair(cell, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)


def results(module, x=None):
    """Output, states and every gradient of a fixed call; dropout draws the same each time."""
    if x is None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    states = random_state(module, 2)
    torch.manual_seed(2)
    y, h = module(x, states if module.mode == "LSTM" else states[0])
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(
        y.square().sum() + sum(s.sum() for s in h), list(parameters.values()), allow_unused=True
    )
    return {"y": y.detach(), "h": h, **dict(zip(parameters, grads, strict=True))}


def assert_same(plain, fused):
    """As torch.nn, without a warning and without moving anything."""
    theirs = results(plain)
    places = {name: p.data_ptr() for name, p in fused.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = results(fused)
    assert {name: p.data_ptr() for name, p in fused.named_parameters()} == places
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    fused.flatten_parameters()
    torch.testing.assert_close(results(fused), ours, rtol=0, atol=0)


class WeightDrop(nn.Module):
    """DropConnect on recurrent weights (Merity et al., 2018), as a parametrization."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, weight):
        return nn.functional.dropout(weight, self.p, self.training)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cell", CELLS)
def test_weight_drop(cell, mode):
    """One mask for all steps, drawn once a call: torch.nn draws several times and uses the last."""
    plain, fused = stack(cell)
    dropped = copy.deepcopy(plain)
    names = ["weight_hh_l0", "weight_hh_l1_reverse"]
    for name in names:
        parametrize.register_parametrization(fused, name, WeightDrop(0.5))
    fused.train(mode == "train")
    ours = results(fused)
    with torch.no_grad():  # the same masks by hand, in the order of the weights
        torch.manual_seed(2)
        masks = {
            name: WeightDrop(0.5).train(mode == "train")(torch.ones_like(getattr(plain, name)))
            for name in names
        }
        for name, mask in masks.items():
            getattr(dropped, name).mul_(mask)
    theirs = results(dropped)
    assert mode == "eval" or (masks["weight_hh_l0"] == 0).any()
    for name, value in theirs.items():
        mine = ours.get(name, ours.get(f"parametrizations.{name}.original"))
        expected = value * masks[name] if name in masks else value
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_spectral_norm(cell):
    plain, fused = stack(cell)
    for module in (plain, fused):
        torch.manual_seed(3)
        parametrizations.spectral_norm(module, "weight_hh_l0", n_power_iterations=200)
    for module in (plain, fused):  # power iteration has converged: one more step changes nothing
        module.eval()
    torch.testing.assert_close(results(fused), results(plain), rtol=1e-6, atol=1e-6)
    assert torch.linalg.matrix_norm(fused.weight_hh_l0, 2).item() == pytest.approx(1, rel=1e-3)


def test_old_spectral_norm():
    plain, fused = stack("gru")
    for module in (plain, fused):
        torch.manual_seed(3)
        nn.utils.spectral_norm(module, "weight_hh_l0")
    torch.testing.assert_close(results(fused), results(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_pruning(cell):
    plain, fused = stack(cell)
    for module in (plain, fused):
        torch.manual_seed(3)
        prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
        prune.ln_structured(module, "weight_ih_l1", amount=0.3, n=2, dim=0)
    assert_same(plain, fused)
    for module in (plain, fused):
        prune.remove(module, "weight_hh_l0")
    assert_same(plain, fused)
    assert (fused.weight_hh_l0 == 0).sum() >= fused.weight_hh_l0.numel() // 2


@pytest.mark.parametrize("form", ["flat buffer", "transposed", "every second element", "expanded"])
@pytest.mark.parametrize("cell", CELLS)
def test_views(cell, form):
    """Parameters that lie in another tensor, as optimizers and FSDP lay them, or with strides."""
    plain, fused = stack(cell)
    flat = torch.cat([p.detach().flatten() for p in fused.parameters()])
    offset = 0
    for theirs, p in zip(plain.parameters(), fused.parameters(), strict=True):
        if form == "flat buffer":
            p.data = flat[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
        elif form == "transposed":
            p.data = p.data.t().contiguous().t()
        elif form == "every second element":
            p.data = torch.stack((p.data, p.data), -1)[..., 0]
        else:
            p.data = p.data[:1].expand(p.shape)
            theirs.data = p.data.clone()
    assert_same(plain, fused)
    if form == "flat buffer":
        flat.mul_(0.5)
        for p in plain.parameters():
            p.data.mul_(0.5)
        assert_same(plain, fused)


@pytest.mark.parametrize("cell", CELLS)
def test_made_without_initialisation(cell):
    """skip_init, which torch.nn's layers refuse; the meta device; load_state_dict(assign=True)."""
    plain, source = stack(cell)
    name = type(source).__name__
    proj = {"proj_size": source.proj_size} if source.proj_size else {}
    if name == "RNN":
        proj = {"nonlinearity": source.nonlinearity}
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, **proj}
    skipped = nn.utils.skip_init(getattr(fusedrnn, name), 3, 4, **options)
    assert skipped.weight_hh_l0.device.type == "cpu"
    skipped.load_state_dict(source.state_dict())
    assert_same(plain, skipped)
    with torch.device("meta"):
        assigned = getattr(fusedrnn, name)(3, 4, **options)
    assert assigned.weight_hh_l0.is_meta
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert assigned.weight_hh_l0.data_ptr() == source.weight_hh_l0.data_ptr()
    assert_same(plain, assigned)


def test_shared_memory():
    plain, fused = stack("lstm")
    assert_same(plain, fused.share_memory())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantize_dynamic_after_unswap():
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 4, 2)).eval()
    x = torch.randn(5, 2, 3)
    expected = quantize_dynamic(copy.deepcopy(model), {nn.LSTM})(x)[0]
    fusedrnn.swap(model)
    assert type(quantize_dynamic(copy.deepcopy(model), {nn.LSTM})[0]) is fusedrnn.LSTM
    quantized = quantize_dynamic(fusedrnn.unswap(model).model, {nn.LSTM})
    assert type(quantized[0]).__module__.startswith("torch.ao")
    torch.testing.assert_close(quantized(x)[0], expected)
