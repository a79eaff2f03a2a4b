"""Two processes give the gradients of one, checkpoint together, and train to the same loss."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedrnn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs a torch with gloo"),
]
RANKS, STEPS = 2, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.rnns = nn.ModuleList([fusedrnn.LSTM(6, 5, 2, bidirectional=True), fusedrnn.GRU(10, 7)])
        self.out = nn.Linear(7, 2)

    def forward(self, x, lengths):
        x = self.embed(x)
        for rnn in self.rnns:
            x, _ = rnn(x, lengths=lengths)
        return self.out(x)


def make():
    """(model, inputs (T, B, 3), lengths (B,), goal), the same in every process."""
    torch.manual_seed(0)
    model = Model().double()
    x, goal = torch.randn(9, 8, 3).double(), torch.randn(9, 8, 2).double()
    return model, x, torch.tensor([9, 3, 0, 5, 9, 1, 7, 2]), goal


def train(model, x, lengths, goal):
    """The losses of some steps; the model is left with the last gradients."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x, lengths) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def ddp(model, share, folder):
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    return parallel, train(parallel, *share)


def fsdp(model, share, folder):
    mesh = init_device_mesh("cpu", (RANKS,))
    for rnn in model.rnns:
        fully_shard(rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(isinstance(rnn, (fusedrnn.LSTM, fusedrnn.GRU)) for rnn in model.rnns)
    return model, train(model, *share)


def checkpoint(model, share, folder):
    """Trains, saves, and loads into a model that is sharded otherwise."""
    source, losses = fsdp(model, share, folder)
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder / "checkpoint")
    torch.manual_seed(9)
    loaded = Model().double()
    for rnn in loaded.rnns:
        fully_shard(rnn, mesh=init_device_mesh("cpu", (RANKS,)))
    state = {"model": get_model_state_dict(loaded)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(loaded, state["model"])
    for (name, a), b in zip(source.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(whole(b), whole(a), rtol=0, atol=0, msg=name)
    return source, losses


def process(rank, how, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    model, x, lengths, goal = make()
    share = (x.tensor_split(RANKS, 1)[rank], lengths.tensor_split(RANKS)[rank])
    parallel, losses = how(model, (*share, goal.tensor_split(RANKS, 1)[rank]), folder)
    dist.all_reduce(losses)
    names = [name.removeprefix("module.") for name, _ in parallel.named_parameters()]
    found = [(whole(p).detach(), whole(p.grad)) for p in parallel.parameters()]
    if rank == 0:
        torch.save(
            {"losses": losses / RANKS, "parameters": dict(zip(names, found, strict=True))},
            folder / "found.pt",
        )
    dist.barrier()
    dist.destroy_process_group()
    # Past the end of the interpreter: one in eight was aborted there, by a thread of gloo that let
    # go of its last tensor, which takes the interpreter.
    os._exit(0)


@pytest.mark.parametrize("how", [ddp, fsdp, checkpoint], ids=lambda how: how.__name__)
def test_two_processes_are_one(how, tmp_path):
    model, *batch = make()
    losses = train(model, *batch)
    multiprocessing.spawn(process, args=(how, tmp_path), nprocs=RANKS)
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["losses"], losses, rtol=1e-10, atol=1e-12)
    assert losses[-1] < losses[0]
    expected = {name: (p.detach(), p.grad) for name, p in model.named_parameters()}
    torch.testing.assert_close(found["parameters"], expected, rtol=1e-9, atol=1e-11)


def test_one_checkpoint_for_both(tmp_path):
    """torch.distributed.checkpoint in a single process: torch.nn's layers read what ours wrote."""
    model, x, _, _ = make()
    plain = fusedrnn.unswap(copy.deepcopy(model)).model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    plain.load_state_dict(state["model"])
    y, expected = plain.rnns[0](plain.embed(x))[0], model.rnns[0](model.embed(x))[0]
    torch.testing.assert_close(y, expected)
