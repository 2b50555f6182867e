"""Pictures cut into the tokens of a transformer and put together again; codes of places."""

import torch


def grid_places(side, device=None):
    """Row and column of the side x side patches, (side^2, 2)."""
    numbers = torch.arange(side, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(numbers, numbers, indexing="ij"), -1).reshape(-1, 2)


def sincos(place, dim, longest=100.0):
    """Sine and cosine of 2-D places (..., 2) in dim / 4 wavelengths an axis, geometric from 2 pi to
    2 pi `longest` -> (..., dim)."""
    exponent = torch.arange(dim // 4, device=place.device) / max(dim // 4 - 1, 1)  # (dim/4,)
    angle = place[..., None] * longest**-exponent  # (..., 2, dim/4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def cut_patches(x, p):
    """(B, C, S, S) -> (B, (S/p)^2, C p p), row by row."""
    batch, channels, side, _ = x.shape
    n = side // p
    cut = x.reshape(batch, channels, n, p, n, p).permute(0, 2, 4, 1, 3, 5)  # (B, n, n, C, p, p)
    return cut.reshape(batch, n**2, channels * p * p)


def join_patches(x, p, channels):
    """Inverse of `cut_patches`: (B, n^2, C p p) -> (B, C, n p, n p)."""
    batch, n_patches, _ = x.shape
    n = round(n_patches**0.5)
    joined = x.reshape(batch, n, n, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    return joined.reshape(batch, channels, n * p, n * p)
