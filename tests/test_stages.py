"""plainst/stages.py: an interrupted stage ends with the weights of one that was not, losses that
are not finite, batches that processes cannot share."""

from dataclasses import dataclass

import pytest
import torch

from plainst import run
from plainst.readers.checked import DataError
from plainst.stages import Stages, ema_update, rank_slice, sample_batch


@dataclass
class Config(run.Config):
    """The flags of a program that trains in stages."""

    save_every: int = 2
    "steps between checkpoints"
    resume: bool = False
    "go on"


def trained(path, resume=False, stop=None, n_steps=5):
    """Two stages of a small network, interrupted at step `stop` of the second -> weights,
    losses."""
    torch.manual_seed(0)
    network, losses = torch.nn.Linear(3, 1), {}
    stages = Stages(Config(resume=resume), path, "checkpoint", "origin", "cells")
    for name in "AB":
        optimiser, losses[name] = torch.optim.AdamW(network.parameters(), lr=0.1), []
        parts = {"model": network, "optimiser": optimiser, "average": None}
        for step in stages.steps(name, n_steps, parts, losses[name]):
            if name == "B" and step == stop:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            loss = network(x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            losses[name].append(loss.detach())
            optimiser.step()
        network = stages.finish(name, network, losses[name])
    return network.state_dict(), losses


def test_a_resumed_stage_ends_like_one_that_was_not_interrupted(tmp_path):
    weights, losses = trained(tmp_path / "full.pt")
    assert all(len(v) == 5 and all(isinstance(x, float) for x in v) for v in losses.values())
    for stop in (0, 1, 3, 4):
        path = tmp_path / f"{stop}.pt"
        with pytest.raises(KeyboardInterrupt):
            trained(path, stop=stop)
        again, losses_again = trained(path, resume=True)
        assert losses_again == losses
        assert all(torch.equal(again[name], weights[name]) for name in weights)
    # everything is done: nothing is trained, the weights and losses are those of the file
    done, losses_done = trained(tmp_path / "full.pt", resume=True)
    assert losses_done == losses and torch.equal(done["weight"], weights["weight"])


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    stages, losses = Stages(Config(save_every=0), tmp_path / "x.pt", "", "", ""), []
    with pytest.raises(DataError, match="stage A is not finite at step 3"):
        for step in stages.steps("A", 60, {}, losses):
            losses.append(torch.tensor(float("nan") if step == 3 else 1.0))
    # read after 50 steps, not after each
    assert step == 49 and not (tmp_path / "x.pt").exists()


def test_processes_share_a_batch_evenly(monkeypatch):
    assert rank_slice(6) == slice(0, 6)
    slices = []
    for rank in range(3):
        monkeypatch.setattr(run, "processes", lambda rank=rank: (rank, 3))
        slices.append(rank_slice(6))
    assert slices == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(DataError, match="a batch of 7 cannot be shared by 3 processes"):
        rank_slice(7)


def test_batches_repeat_no_row_where_that_is_cheap():
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(100, 120).numpy()
    batch = sample_batch(rows, 20, generator)
    assert sorted(batch.tolist()) == rows.tolist()
    assert sample_batch(rows, 30, generator).shape == (30,)


def test_weights_are_averaged():
    old, new = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = 0.75 * old.weight.detach() + 0.25 * new.weight.detach()
    ema_update(old, new, 0.75)
    torch.testing.assert_close(old.weight.detach(), want)
