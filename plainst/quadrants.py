"""Attention of tokens and patches in four quadrants without the dense mask: the fast form, which
computes only what is read.

Names of quadrants say who asks, then who is read: `p2h`, a pathway token reads patches. B slides,
P tokens, S patches, H heads of width d; a neighbour table has K places a patch.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# most patches of an attention block
BLOCK = 64
# patches from which on work is done in pieces
PIECE = 16384


class Patches(NamedTuple):
    """Which patches there are in a batch, and which patches each reads with local h2h."""

    # (B, S) bool, False = padding
    is_real: torch.Tensor
    # no patch is padding: known without asking the device
    is_unpadded: bool
    # (B, S, K) patches that a patch reads, itself first
    table: torch.Tensor
    # (B, S, K) distance in whole lattice pitches, 0 = itself, -1 = empty place
    ring: torch.Tensor
    # the same table as `stack_blocks` has it
    blocks: tuple


def in_blocks(place, table, ring, size=BLOCK):
    """The neighbour table as small dense pieces, which is what a matrix product wants: patches are
    halved at the median of the wider axis until a block holds at most `size`, and the keys of a
    block are all patches that one of its patches reads, itself and a rim. Memory O(S size).

    place (S, 2), table, ring (S, K), numpy -> rows (N, n) patches, keys (N, U) patches, ring
    (N, n, U) int8 as in the table, -1 = not read, slot (S,) place of a patch in the flattened rows.
    """
    blocks = [np.arange(len(place))]
    # all blocks have the same length, give or take one
    while len(blocks[0]) > size:
        halves = []
        for rows in blocks:
            axis = np.ptp(place[rows], axis=0).argmax()
            rows = rows[np.argsort(place[rows, axis], kind="stable")]
            middle = (len(rows) + 1) // 2
            halves += [rows[:middle], rows[middle:]]
        blocks = halves
    keys = [np.unique(table[rows][ring[rows] >= 0]) for rows in blocks]
    n, n_keys = max(map(len, blocks)), max(map(len, keys))
    block_rows = np.zeros((len(blocks), n), int)
    block_keys = np.zeros((len(blocks), n_keys), int)
    block_ring = np.full((len(blocks), n, n_keys), -1, np.int8)
    slot = np.empty(len(place), int)
    for i, (rows, read) in enumerate(zip(blocks, keys)):
        block_rows[i, : len(rows)], block_keys[i, : len(read)] = rows, read
        slot[rows] = i * n + np.arange(len(rows))
        row, position = np.nonzero(ring[rows] >= 0)
        column = np.searchsorted(read, table[rows][row, position])
        block_ring[i, row, column] = ring[rows][row, position]
        # a row of padding reads something: no softmax over nothing
        block_ring[i, len(rows) :, 0] = 0
    return tuple(map(torch.tensor, (block_rows, block_keys, block_ring, slot)))


def stack_blocks(blocks, longest, device):
    """Blocks of several slides in one list: rows (N, n), keys (N, U) and slot (B S,) count through
    the flattened (B S) patches; ring (N, n, U); slide (N,) of a block."""
    n = max(b[0].shape[1] for b in blocks)
    n_keys = max(b[1].shape[1] for b in blocks)
    parts, first = [], 0
    for i, (rows, keys, ring, slot) in enumerate(blocks):
        width = rows.shape[1]
        ring = F.pad(ring, (0, n_keys - keys.shape[1], 0, n - width), value=-1)
        ring[:, width:, 0] = 0
        block, row = slot // width, slot % width
        slot = block * n + row + first
        parts.append(
            (
                F.pad(rows, (0, n - width)) + i * longest,
                F.pad(keys, (0, n_keys - keys.shape[1])) + i * longest,
                ring,
                F.pad(slot, (0, longest - len(slot))),
                torch.full((len(rows),), i),
            )
        )
        first += len(rows) * n
    return tuple(torch.cat(part).to(device) for part in zip(*parts))


def in_pieces(function, pieces, dim=0):
    """function(*piece) of every piece, joined along `dim`. More than one: recomputed in the
    backward pass, so that the intermediate tensors of 100,000 patches never exist at once."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return function(*pieces[0])
    if not torch.is_grad_enabled():
        return torch.cat([function(*piece) for piece in pieces], dim)
    return torch.cat([checkpoint(function, *p, use_reentrant=False) for p in pieces], dim)


def by_rows(function, x):
    """function(x) of x (B, n, D), whose rows do not meet in `function`: in pieces of PIECE rows."""
    return in_pieces(function, [(part,) for part in x.split(PIECE, 1)], dim=1)


def quadrant_attention(q, k, v, n_tokens, quadrants, patches, is_local, bias=None):
    """Attention over [tokens; patches] in which a query reads itself and the quadrants that are on.

    q, k, v (B, P + S, H, d); n_tokens: P; patches: `Patches`; is_local: h2h is within the table,
    not over all patches; bias (rings, H): added to the scores of local h2h by distance, or None.
    -> (B, P + S, H, d). O(S (P + K) d), O(S (P + S) d) with h2h over all patches.
    """
    tokens, rest = slice(n_tokens), slice(n_tokens, None)
    q_t, k_t, v_t = (a[:, tokens] for a in (q, k, v))  # (B, P, H, d)
    q_h, k_h, v_h = (a[:, rest] for a in (q, k, v))  # (B, S, H, d)
    out_t = tokens_read(q_t, k_t, v_t, k_h, v_h, quadrants, patches)
    if "h2p" not in quadrants:
        k_t, v_t = k_t[:, :0], v_t[:, :0]
    if "h2h" not in quadrants:
        out_h = itself_and_tokens(q_h, k_h, v_h, k_t, v_t)
    elif is_local:
        out_h = neighbours_and_tokens(q_h, k_h, v_h, k_t, v_t, patches.blocks, bias)
    else:
        out_h = all_and_tokens(q_h, k_h, v_h, k_t, v_t, patches)
    return torch.cat([out_t, out_h], 1)


def tokens_read(q, k, v, k_h, v_h, quadrants, patches):
    """p2p and p2h: q, k, v (B, P, H, d), k_h, v_h (B, S, H, d) -> (B, P, H, d). O(P (P + S) d)."""
    n_tokens = q.shape[1]
    mask = torch.eye(n_tokens, dtype=torch.bool, device=q.device)
    if "p2p" in quadrants:
        mask = torch.ones_like(mask)
    mask = mask[None, None].expand(len(q), 1, -1, -1)  # (B, 1, P, P)
    if "p2h" in quadrants:
        k, v = torch.cat([k, k_h], 1), torch.cat([v, v_h], 1)  # (B, P + S, H, d)
        is_read = patches.is_real[:, None, None].expand(-1, 1, n_tokens, -1)
        mask = torch.cat([mask, is_read], -1)  # (B, 1, P, P + S)
    is_all = patches.is_unpadded and "p2p" in quadrants
    return attention(q, k, v, None if is_all else mask)


def itself_and_tokens(q, k, v, k_t, v_t):
    """A patch's softmax over itself and the tokens: the bottleneck, O(S P d). q, k, v (B, S, H, d),
    k_t, v_t (B, P, H, d) -> (B, S, H, d)."""
    q = q * q.shape[-1] ** -0.5
    itself = (q * k).sum(-1, keepdim=True)  # (B, S, H, 1)
    to_tokens = torch.einsum("bshd,bphd->bshp", q, k_t)
    weight = torch.cat([itself, to_tokens], -1).softmax(-1)  # (B, S, H, 1 + P)
    return weight[..., :1] * v + torch.einsum("bshp,bphd->bshd", weight[..., 1:], v_t)


def all_and_tokens(q, k, v, k_t, v_t, patches):
    """A patch reads all patches and the tokens, O(S (P + S) d); shapes as above."""
    is_token = patches.is_real.new_ones(k_t.shape[:2])  # (B, P)
    mask = torch.cat([is_token, patches.is_real], 1)[:, None, None]  # (B, 1, 1, P + S)
    k, v = torch.cat([k_t, k], 1), torch.cat([v_t, v], 1)  # (B, P + S, H, d)
    return attention(q, k, v, None if patches.is_unpadded else mask)


def neighbours_and_tokens(q, k, v, k_t, v_t, blocks, bias):
    """A patch reads its neighbours and the tokens, O(S (P + K) d); shapes as above."""
    rows, keys, ring, slot, slide = blocks
    flat = [a.flatten(0, 1) for a in (q, k, v)]  # (B S, H, d)
    parts = zip(*(a.split(PIECE // BLOCK) for a in (rows, keys, ring, slide)))
    pieces = [(*flat, k_t, v_t, bias, *part) for part in parts]
    out = in_pieces(attention_of_blocks, pieces)  # (N, n, H, d)
    return out.flatten(0, 1)[slot].view(q.shape)  # (B, S, H, d)


def attention_of_blocks(q, k, v, k_t, v_t, bias, rows, keys, ring, slide):
    """Attention of N blocks: q, k, v (B S, H, d), k_t, v_t (B, P, H, d) -> (N, n, H, d)."""
    k = torch.cat([k_t[slide], k[keys]], 1)  # (N, P + U, H, d)
    v = torch.cat([v_t[slide], v[keys]], 1)
    is_read, n_tokens = (ring >= 0)[:, None], k_t.shape[1]  # (N, 1, n, U)
    if bias is None:
        return attention(q[rows], k, v, F.pad(is_read, (n_tokens, 0), value=True))
    # a product with a one-hot matrix: the gradient of an embedding is summed one by one
    rings = torch.arange(len(bias), dtype=ring.dtype, device=ring.device)[:, None]
    one_hot = (ring.flatten(1)[:, None] == rings).to(bias.dtype)  # (N, rings, n U)
    scores = (bias.T @ one_hot).unflatten(2, ring.shape[1:])  # (N, H, n, U)
    scores = scores.masked_fill(~is_read, float("-inf"))
    return attention(q[rows], k, v, F.pad(scores, (n_tokens, 0)))


def attention(q, k, v, mask):
    """Scaled dot-product attention: q (B, n, H, d), k, v (B, m, H, d), mask (B, 1 or H, n or 1, m)
    True = read, or added to the scores; None, which opens the fused kernels: all are read."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
