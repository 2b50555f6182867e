"""Two layers of torch in a faster form: dropout from sixteen random bits, and a norm folded into
the linear map after it."""

import torch
from torch import nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Zero a number with probability p in training, divide the others by what is kept of 1
    (Srivastava et al. 2014).

    It is `nn.Dropout`, which on a CPU draws a float for every number: most of the time of dropout,
    up to a quarter of an epoch of a large slide. Sixteen random bits are enough: p is rounded to a
    multiple of 2^-16.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        """x of any shape -> the same shape."""
        if x.device.type != "cpu" or not self.training or not self.p:
            return F.dropout(x, self.p, self.training)
        # of the 2^16 values of an int16
        n_dropped = min(round(self.p * 2**16), 2**16 - 1)
        # a draw holds four
        n_draws = (x.numel() + 3) // 4
        bits = torch.empty(n_draws, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        is_lost = bits.view(torch.int16)[: x.numel()].view(x.shape) < n_dropped - 2**15
        return x.masked_fill(is_lost, 0.0).mul_(1 / (1 - n_dropped / 2**16))


class NormFirst(nn.Sequential):
    """LayerNorm -> Linear -> whatever follows, with the scale and shift of the norm folded into the
    linear map: W (g x + b) + c = (W g) x + (W b + c).

    It is the same function; its gradient needs no (N, dim_in) array, where x comes from the data
    and asks for none.
    """

    def forward(self, x):
        """x (N, dim_in) -> (N, dim)."""
        norm, linear, *rest = self
        x = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)  # (N, dim_in)
        # (N, hidden)
        x = F.linear(x, linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias)
        for layer in rest:
            x = layer(x)
        return x  # (N, dim)
