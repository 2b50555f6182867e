r"""Blocks of a pre-norm transformer: attention on the same set or another, feed-forward."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    r"""Multi-head attention (Vaswani et al. 2017, Eq. 1) of x on y, or of x on itself.

    $$\mathrm{Attn}(x, y) = W_o\,\mathrm{softmax}\Big(\frac{W_q x\,(W_k y)^\top}{\sqrt{d / H}}
    + b\Big)\, W_v y \tag{1}$$

    Test: test_attention_equals_its_equation
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, y=None, bias=None):
        """x (B, n, d), y (B, m, d), bias (B, 1, 1, m) or None, added to the scores -> (B, n, d)."""
        y = x if y is None else y
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, n, d/H)
        # one set of queries may serve the whole batch
        q = q.expand(len(y), -1, -1, -1)
        kv = self.kv(y).unflatten(-1, (2, self.heads, -1))  # (B, m, 2, H, d/H)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, m, d/H) each
        read = F.scaled_dot_product_attention(q, k, v, bias)  # (B, H, n, d/H)
        return self.out(read.transpose(1, 2).flatten(2))  # (B, n, d)


def feed_forward(dim, ratio):
    """LayerNorm, then two linear maps: (B, n, d) -> (B, n, d)."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
    )


class Block(nn.Module):
    r"""Pre-norm transformer block.

    $$x \leftarrow x + \mathrm{Attn}(\mathrm{LN}\,x), \qquad x \leftarrow x + \mathrm{FFN}(x)
    \tag{2}$$

    Test: test_blocks_equal_their_equations
    """

    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.ffn = feed_forward(dim, ratio)

    def forward(self, x, bias=None):
        """x (B, n, d) -> (B, n, d)."""
        x = x + self.attention(self.norm(x), bias=bias)
        return x + self.ffn(x)


class CrossBlock(nn.Module):
    r"""x reads y, with a learned weight a per channel, `start` at first.

    $$x \leftarrow x + a \odot \mathrm{Attn}(\mathrm{LN}\,x, \mathrm{LN}\,y), \qquad
    x \leftarrow x + \mathrm{FFN}(x) \tag{3}$$

    Test: test_blocks_equal_their_equations
    """

    def __init__(self, dim, heads, ratio, start=1.0):
        super().__init__()
        self.norm, self.norm_y = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.ffn = feed_forward(dim, ratio)
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(self, x, y, bias=None):
        """x (B, n, d), y (B, m, d) -> (B, n, d)."""
        x = x + self.scale * self.attention(self.norm(x), self.norm_y(y), bias)
        return x + self.ffn(x)
