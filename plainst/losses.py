"""Around a loss of several terms: a log with the gradient of each, groups of parameters, and
BatchNorm layers that stand still."""

import contextlib

import torch
from torch import nn

from plainst.readers.checked import DataError


class LossLog:
    """Weighted loss terms of a stage, checked at every step and written down at some with the norm
    of the gradient that each sends to the parameters: a term without gradient is seen there,
    whatever its value.

    rows: a list to which dictionaries with stage, epoch, term, value and grad_norm are appended.
    """

    def __init__(self, stage, rows):
        self.stage, self.rows, self.logged_epoch = stage, rows, -1

    def total(self, terms, epoch, parameters, is_logged=False):
        """Sum of the dict {name: weighted scalar}, with `is_logged` a row per term, for the first
        step of an epoch. Raises DataError naming a term that is not finite."""
        total = sum(terms.values())
        # one look a step: on a GPU the host waits for it
        if not torch.isfinite(total):
            self.refuse(terms, total, epoch)
        if is_logged and epoch != self.logged_epoch:
            self.logged_epoch = epoch
            self.log(terms, epoch, list(parameters))
        return total

    def refuse(self, terms, total, epoch):
        """Raise DataError naming the first term that is not finite, or their sum."""
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        name = bad[0] if bad else "sum"
        value = terms.get(name, total).item()
        raise DataError(
            f"{self.stage}, epoch {epoch}: the loss term {name!r} is {value}: choose a smaller "
            "learning rate or weight, or check the input"
        )

    def log(self, terms, epoch, parameters):
        """Append a row per term."""
        for name, value in terms.items():
            gradients = []
            if value.requires_grad:
                gradients = torch.autograd.grad(
                    value, parameters, retain_graph=True, allow_unused=True
                )
            squares = [g.square().sum().item() for g in gradients if g is not None]
            row = {"stage": self.stage, "epoch": epoch, "term": name, "value": value.item()}
            self.rows.append(row | {"grad_norm": sum(squares) ** 0.5})


def parameter_groups(module, weight_decay):
    """Groups for an optimiser: decay on weight matrices only; biases, BatchNorm and other vectors
    are left alone."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def frozen_statistics(module):
    """Within this context BatchNorm layers use their running statistics and do not update them."""
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    were_training = [layer.training for layer in layers]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer, was_training in zip(layers, were_training):
            layer.train(was_training)
