"""Trainings one after another, as a cross-validation wants them: resumed where one was interrupted,
and shared out over the processes of torchrun where that is wanted."""

import torch

from plainst import run


class Jobs:
    """Jobs are numbered in the order in which `do` is called; what is done has a history (one row
    an epoch) and, where asked for, weights.

    latest: path of the checkpoint, None for none; origin: what the run is made of (checksum of its
    files, slides, genes), which must not change between a checkpoint and --resume; what: the kind
    of checkpoint, in words of an error; is_shared: process i of n does the jobs i, i + n, ...
    Every job seeds itself, so two processes end with the numbers of one, bit for bit.
    """

    def __init__(self, config, latest=None, origin=None, what="checkpoint", is_shared=False):
        self.config, self.latest, self.origin, self.is_shared = config, latest, origin, is_shared
        self.number, self.done, self.going = 0, [], None
        if latest is not None and config.resume:
            needs, files = ["done", "going"], "files, slides or genes"
            saved = run.read_latest(latest, config, what, needs, origin, files)
            with run.checkpoint_fits(latest):
                self.done = [{k: job[k] for k in ("weights", "history")} for job in saved["done"]]
            self.going = saved["going"]
        self.n_resumed = len(self.done)

    def do(self, train, keep_weights=False):
        """Do the next job: train(number=, saved=, save=) -> model, history. saved: what `save` was
        given when this job was interrupted, else None; save: None where nothing is saved.

        -> the model, None where the job was done before or is another process's.
        """
        number, (rank, world) = self.number, run.processes()
        self.number += 1
        if number < len(self.done):
            return None
        if self.is_shared and number % world != rank:
            self.done.append(None)
            return None
        state = self.going if number == self.n_resumed else None
        save = self.save if self.latest is not None else None
        model, history = train(number=number, saved=state, save=save)
        weights = model.state_dict() if keep_weights else {}
        self.done.append({"weights": weights, "history": history})
        return model

    def save(self, state):
        """Write the checkpoint: what is done, and the state of the job that is being done."""
        saved = {"config": run.resumable(self.config), "data": self.origin}
        saved |= {"done": self.done, "going": state}
        if run.processes()[0] == 0:
            run.write_atomically(self.latest, lambda file: torch.save(saved, file))

    def exchange(self, first, epochs, device, make=None):
        """Give the jobs from `first` on to all processes, each from the one that did it: histories
        of `epochs` pairs and, with `make`, weights of the model that it makes."""
        world = run.processes()[1]
        if world == 1:
            return
        for number in range(first, len(self.done)):
            history = torch.zeros(epochs, 2, dtype=torch.float64, device=device)
            weights = {}
            if make is not None:
                state = make().to(device).state_dict()
                weights = {k: w.clone() for k, w in state.items()}
            if self.done[number] is not None:
                rows = torch.tensor(self.done[number]["history"], dtype=torch.float64)
                history, weights = history.copy_(rows), self.done[number]["weights"]
            for tensor in (history, *weights.values()):
                torch.distributed.broadcast(tensor, number % world)
            rows = [tuple(row) for row in history.tolist()]
            self.done[number] = {"weights": weights, "history": rows}

    def histories(self):
        """History of every job."""
        return [job["history"] for job in self.done]


class Job:
    """One training of a queue: its random numbers, its epochs, and what is saved of it.

    number, saved, save: as `Jobs.do` gives them. Every epoch seeds itself, so that going on from
    what was saved gives what an uninterrupted training gives.
    """

    def __init__(self, config, number, saved=None, save=None):
        self.config, self.number, self.saved, self.save = config, number, saved, save
        # [(loss, validation score)], one an epoch
        self.history = []

    def seed_start(self):
        """Seed the start of the weights."""
        torch.manual_seed(1_000_003 * self.config.seed + self.number)

    def epochs(self, model, optimiser, n_epochs):
        """Number of every epoch that is left to do; model and optimiser go on from what was saved,
        and are saved every --save_every epochs."""
        if self.saved is not None:
            model.load_state_dict(self.saved["model"])
            optimiser.load_state_dict(self.saved["optimiser"])
            self.history += [tuple(row) for row in self.saved["history"]]
        for epoch in run.progress(range(len(self.history), n_epochs), "epochs"):
            torch.manual_seed(1_000_003 * self.config.seed + 1009 * (self.number + 1) + epoch)
            yield epoch
            every = self.config.save_every
            if self.save is not None and every and (epoch + 1) % every == 0:
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                self.save(state | {"history": self.history})
