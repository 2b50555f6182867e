"""Training in stages that follow each other: a checkpoint from which --resume goes on in the middle
of any of them, batches that are shared by the processes of torchrun, AdamW with a warm-up, averaged
weights.

    stages = Stages(config, record.folder / "latest.pt", "spatia checkpoint", checksum, "cells")
    losses = []
    for step in stages.steps("A", 300, {"model": model, "optimiser": optimiser}, losses):
        ...
        losses.append(loss)
    stages.finish("A", model, losses)
"""

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from plainst import run
from plainst.readers.checked import DataError

# steps between two looks at the losses: to read one is to wait for the device
LOOK = 50
# optimiser steps of warm-up, a tenth of the steps where that is less
WARM_UP = 100


class Stages:
    """What the finished stages of a run left and where the present one stands, in the file `path`.

    config: flags, `save_every` and `resume` among them; what, origin, files: see `run.read_latest`.
    Raises DataError where --resume cannot go on from the file.
    """

    def __init__(self, config, path, what, origin, files):
        self.path, self.save_every = path, config.save_every
        self.saved = {"config": run.resumable(config), "data": origin, "done": {}, "going": None}
        if config.resume:
            self.saved = run.read_latest(path, config, what, ["done", "going"], origin, files)

    def steps(self, name, n_steps, parts, losses):
        """The steps that stage `name` still has to do, none where it is finished.

        parts {name: module, optimiser or None}: brought to where the checkpoint left them, and
        saved every `save_every` steps. losses: a list to which the loop appends the loss (a scalar
        tensor) of every step; they become floats here. Raises DataError for one that is not finite.
        """
        if name in self.saved["done"]:
            losses[:] = self.saved["done"][name]["history"]
            return
        parts = {key: part for key, part in parts.items() if part is not None}
        going = self.saved["going"]
        if going is not None and going["stage"] == name:
            losses[:] = going["history"]
            for key, part in parts.items():
                part.load_state_dict(going[key])
        n_read = len(losses)
        for step in run.progress(range(n_read, n_steps), f"stage {name}"):
            yield step
            is_due = self.save_every and (step + 1) % self.save_every == 0
            if is_due or len(losses) - n_read == LOOK:
                n_read = read_losses(losses, n_read, name)
            if is_due:
                states = {key: part.state_dict() for key, part in parts.items()}
                self.saved["going"] = {"stage": name, "history": list(losses), **states}
                self.write()
        read_losses(losses, n_read, name)

    def finish(self, name, network, losses):
        """Note the end of a stage, which leaves `network`; -> the network, in evaluation mode, with
        the weights of the checkpoint where the stage had been finished before."""
        if name in self.saved["done"]:
            network.load_state_dict(self.saved["done"][name]["model"])
            return network.eval()
        self.saved["done"][name] = {"model": network.state_dict(), "history": losses}
        self.saved["going"] = None
        if self.save_every:
            self.write()
        return network.eval()

    def write(self):
        """Write the checkpoint, in the first process only."""
        if run.processes()[0] == 0:
            run.write_atomically(self.path, lambda file: torch.save(self.saved, file))


def read_losses(losses, n_read, name):
    """Make floats of the tensors in `losses` from number n_read on; -> how many are read now.
    Raises DataError for a loss that is not finite."""
    if len(losses) > n_read:
        losses[n_read:] = torch.stack(losses[n_read:]).tolist()
    is_finite = np.isfinite(losses)
    if not is_finite.all():
        raise DataError(
            f"the loss of stage {name} is not finite at step {is_finite.argmin()}: check the "
            "counts for extreme values"
        )
    return len(losses)


class ScheduledAdamW(torch.optim.AdamW):
    """AdamW whose rates rise over a warm-up, then fall on a cosine to 0; gradients are summed over
    the processes and clipped at norm 1.

    parameters: of the network, or groups of them; lr: the peak of the groups that name none;
    n_steps: of the stage.
    """

    def __init__(self, parameters, lr, n_steps, weight_decay):
        super().__init__(parameters, lr, weight_decay=weight_decay, foreach=True)
        self.n_steps, self.warm_up = n_steps, max(1, min(WARM_UP, n_steps // 10))
        self.peaks = [group["lr"] for group in self.param_groups]

    def set_rates(self, step):
        """Set the learning rates of step number `step`."""
        for group, peak in zip(self.param_groups, self.peaks):
            group["lr"] = peak * run.warmup_cosine(step, self.n_steps, self.warm_up)

    def sum_and_clip(self, loss):
        """Sum loss and gradients over the processes, clip the gradients; -> the loss of the whole
        batch."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        total = run.sum_gradients(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return total


def step_generator(seed, stage, step):
    """torch.Generator that knows seed, stage (0, 1, 2) and step only: an interrupted or shared run
    draws the same numbers."""
    return torch.Generator().manual_seed((seed * 3 + stage) * 10_000_019 + step)


def sample_batch(rows, batch, generator):
    """A batch of rows: without repeats where that is cheap. -> (B,) int64."""
    n = len(rows)
    if batch <= n <= 100_000:
        return torch.as_tensor(rows)[torch.randperm(n, generator=generator)[:batch]]
    return torch.as_tensor(rows)[torch.randint(n, (batch,), generator=generator)]


def rank_slice(batch):
    """Rows of a batch that this process computes. Raises DataError where the processes cannot share
    it evenly."""
    rank, world = run.processes()
    if batch % world:
        raise DataError(
            f"a batch of {batch} cannot be shared by {world} processes: start a number of "
            "processes that divides it"
        )
    return slice(rank * batch // world, (rank + 1) * batch // world)


def sum_over_processes(x, device):
    """Sum of a CPU tensor over the processes, each of which filled its part and left zeros."""
    if run.processes()[1] == 1:
        return x
    shared = x.to(device)
    torch.distributed.all_reduce(shared)
    return shared.cpu()


@torch.no_grad()
def ema_update(average, model, decay):
    """average <- decay average + (1 - decay) model, over the parameters of two equal networks."""
    # all in one call
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(model.parameters()), None)
