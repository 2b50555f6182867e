"""Networks that serve as baselines of H&E -> genes: one linear layer, and two that know the slide
as a bag of patches and give all of its spots the slide's mean."""

import numpy as np
import torch
from torch import nn

# baselines that know slides only, not spots
BAGS = ("abmil", "transmil")


class OneLinear(nn.Module):
    """One linear layer from features to genes, trained as the model is (HE2RNA style: Schmauch et
    al. 2020, without its top-k pooling)."""

    def __init__(self, dim_in, n_genes):
        super().__init__()
        self.genes = nn.Linear(dim_in, n_genes)

    def forward(self, x, **_):
        """x (B, S, F) -> genes (B, S, G)."""
        return {"genes": self.genes(x)}


class ABMIL(nn.Module):
    """Gated attention pooling, Ilse et al. 2018, Eq. 9: a_i = softmax_i w (tanh(V h_i) * sigmoid(U
    h_i)); genes = linear(sum_i a_i h_i)."""

    def __init__(self, dim_in, n_genes, dim=256, dropout=0.25):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim_in, dim), nn.ReLU(), nn.Dropout(dropout))
        self.v, self.u, self.w = (
            nn.Linear(dim, dim // 2),
            nn.Linear(dim, dim // 2),
            nn.Linear(dim // 2, 1),
        )
        self.genes = nn.Linear(dim, n_genes)

    def forward(self, x, valid, **_):
        """x (B, S, F), valid (B, S) -> genes (B, G) of the slide's mean."""
        h = self.embed(x)  # (B, S, D)
        # (B, S, 1)
        a = (
            self.w(self.v(h).tanh() * self.u(h).sigmoid())
            .masked_fill(~valid[..., None], float("-inf"))
            .softmax(1)
        )
        return {"genes": self.genes((a * h).sum(1))}


def pseudo_inverse(a, steps=6):
    """Moore-Penrose inverse of softmax matrices (..., m, m) by the iteration of Xiong et al. 2021,
    Sec. 3.2."""
    eye = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
    z = a.transpose(-1, -2) / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
    for _ in range(steps):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def nystrom_attention(q, k, v, landmarks=64):
    """softmax(q kl') pinv(softmax(ql kl')) softmax(ql k') v, landmarks = segment means (Xiong et
    al. 2021, Eq. 13): O(S m d). q, k, v (H, S, d) -> (H, S, d)."""
    m, s = min(landmarks, q.shape[1]), q.shape[1]
    q = q * q.shape[-1] ** -0.5
    # (S,)
    segment = torch.div(torch.arange(s, device=q.device) * m, s, rounding_mode="floor")
    size = torch.bincount(segment, minlength=m)[:, None]
    # (H, m, d)
    ql, kl = (
        torch.zeros(len(a), m, a.shape[-1], device=a.device, dtype=a.dtype).index_add(1, segment, a)
        / size
        for a in (q, k)
    )
    inner = (ql @ kl.transpose(1, 2)).softmax(-1)  # (H, m, m)
    return (q @ kl.transpose(1, 2)).softmax(-1) @ (
        pseudo_inverse(inner) @ ((ql @ k.transpose(1, 2)).softmax(-1) @ v)
    )


class TransMIL(nn.Module):
    """Shao et al. 2021: class token, Nystrom attention, PPEG (depthwise 7, 5, 3 convolutions on the
    sequence as a square), Nystrom attention."""

    def __init__(self, dim_in, n_genes, dim=128, heads=8, landmarks=64):
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.embed = nn.Sequential(nn.Linear(dim_in, dim), nn.ReLU())
        self.cls = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.out = (
            nn.ModuleList(nn.Linear(dim, n * dim, bias=n == 1) for _ in range(2)) for n in (3, 1)
        )
        self.ppeg = nn.ModuleList(
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim) for size in (7, 5, 3)
        )
        self.genes = nn.Linear(dim, n_genes)

    def attention(self, h, i):
        # (H, S, d) each
        q, k, v = (
            self.qkv[i](self.norms[i](h)).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        )
        return h + self.out[i](
            nystrom_attention(q, k, v, self.landmarks).transpose(0, 1).flatten(1)
        )

    def forward(self, x, valid, **_):
        """x (B, S, F), valid (B, S) -> genes (B, G) of the slide's mean."""
        return {
            "genes": torch.stack([self.genes(self.slide(x[b, valid[b]])) for b in range(len(x))])
        }

    def slide(self, x):
        """(S, F) -> (D,), the class token after the second attention."""
        h = self.embed(x)
        side = int(np.ceil(len(h) ** 0.5))
        # the first spots again, to fill the square as in the paper
        h = torch.cat([h, h[: side * side - len(h)]])
        h = self.attention(torch.cat([self.cls[None], h]), 0)  # (1 + side^2, D)
        square = h[1:].T.view(1, -1, side, side)
        square = square + sum(conv(square) for conv in self.ppeg)
        return self.norms[2](self.attention(torch.cat([h[:1], square[0].flatten(1).T]), 1)[0])


NETWORKS = {"linear": OneLinear, "abmil": ABMIL, "transmil": TransMIL}


def trained_baselines(test, train):
    """{name: [prediction (S, G) of every test sample]} of one linear layer, ABMIL and TransMIL; and
    {name: trained models}.

    test: [test sample] with features x (S, F); train(name, network): trains what network(dim_in,
    n_genes) makes -> models, [prediction (S, G), or (G,) of a bag, of every test sample].
    """
    predictions, trained = {}, {}
    for name, network in NETWORKS.items():
        models, values = train(name, network)
        if name in BAGS:
            values = [np.tile(mean, (len(s.x), 1)) for mean, s in zip(values, test)]
        predictions[name], trained[name] = values, models
    return predictions, trained
