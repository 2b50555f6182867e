"""Slides as a network of patches reads them: features, neighbours and targets as tensors, batches,
and the scale of both."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

import data
import metrics
from data import DataError
from evaluation import hest
from plainst import run
from plainst.quadrants import Patches, in_blocks, stack_blocks


@dataclass
class Sample:
    """One slide, ready for a network. S spots, K places of the neighbour table, G genes."""

    name: str
    patient: str
    x: torch.Tensor  # (S, F) frozen features
    # (S, 2) position in lattice pitches
    place: torch.Tensor
    # (S, K) rows read by local h2h, the spot itself first
    table: torch.Tensor
    # (S, K) rounded distance in pitches, 0 = itself, -1 = empty place
    ring: torch.Tensor
    # the same table in blocks, see `quadrants.in_blocks`
    blocks: tuple
    y: torch.Tensor = None  # (S, G) target
    counts: torch.Tensor = None  # (S, G) raw counts
    library: torch.Tensor = None  # (S,) counts of all genes
    # (S,) bool, spots with enough counts
    scored: torch.Tensor = None
    # (G,) bool, genes on this slide's panel
    measured: torch.Tensor = None
    slide: data.Slide = None
    # `collate` of it alone, on the device: made once for all epochs
    batch: dict = None


def neighbourhood(slide, rings):
    """place (S, 2) in pitches, table (S, K), ring (S, K) of local h2h, blocks: lattice sites within
    `rings`, else as many nearest spots."""
    if slide.n_spots < 2:
        raise DataError(
            f"slide {slide.sample} has {slide.n_spots} spot: a correlation across spots needs "
            "at least two, leave the slide out"
        )
    place = slide.xy / data.lattice_pitch(slide.xy)  # (S, 2)
    if rings == 0:
        table = np.zeros((slide.n_spots, 0), np.int64)
    elif slide.grid is not None:
        table = data.lattice_table(slide.grid, rings)
    else:
        table = data.knn_table(slide.xy, min(3 * rings * (rings + 1), slide.n_spots - 1))
    itself = np.arange(slide.n_spots)[:, None]
    distance = np.linalg.norm(place[table] - place[:, None], axis=-1)  # (S, K)
    ring = np.where(table < 0, -1, np.rint(distance).clip(1, rings + 1))
    ring = np.concatenate([np.zeros_like(itself), ring], 1).astype(np.int64)  # (S, K+1)
    table = np.concatenate([itself, np.where(table < 0, itself, table)], 1)  # (S, K+1)
    place = place - place.mean(0)
    blocks = in_blocks(place, table, ring)
    return torch.tensor(place, dtype=torch.float32), torch.tensor(table), torch.tensor(ring), blocks


def to_sample(config, slide, genes=None):
    """Slide -> Sample; without `genes` there is no target (prediction)."""
    x = hest.slide_features(config, slide)
    sample = Sample(
        slide.sample, slide.patient, x, *neighbourhood(slide, config.rings), slide=slide
    )
    if genes is not None:
        arrays = hest.target_expression(slide, genes, config.target)
        sample.y, sample.counts, sample.library, sample.measured = map(torch.from_numpy, arrays)
        sample.scored = torch.from_numpy(hest.enough_counts(slide, config.min_counts))
    return sample


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def collate(samples, device="cpu"):
    """Samples -> dict of tensors padded to the longest slide: x (B, S, F), valid (B, S), ...
    `scored` (B, S, G) is where a target counts."""
    longest = max(len(s.x) for s in samples)
    widest = max(s.table.shape[1] for s in samples)

    def stack(values, fill=0):
        parts = []
        for value in values:
            sides = (0, 0) * (value.ndim - 1) + (0, longest - len(value))
            parts.append(F.pad(value, sides, value=fill))
        return torch.stack(parts).to(device)

    valid = stack([torch.ones(len(s.x), dtype=torch.bool) for s in samples])  # (B, S)
    table = stack([F.pad(s.table, (0, widest - s.table.shape[1])) for s in samples])
    ring = stack([F.pad(s.ring, (0, widest - s.ring.shape[1]), value=-1) for s in samples], -1)
    is_unpadded = all(len(s.x) == longest for s in samples)
    blocks = stack_blocks([s.blocks for s in samples], longest, device)
    out = {
        "x": stack([s.x for s in samples]),
        "place": stack([s.place for s in samples]),
        "valid": valid,
        "patches": Patches(valid, is_unpadded, table, ring, blocks),
    }
    if samples[0].y is not None:
        for name in ("y", "counts", "library"):
            out[name] = stack([getattr(s, name) for s in samples])
        measured = torch.stack([s.measured for s in samples]).to(device)
        has_counts = stack([s.scored for s in samples])
        out["scored"] = has_counts[..., None] & measured[:, None]  # (B, S, G)
    return out


def with_batch(samples, device):
    """Copies of the samples that hold their own batch, made once for all epochs."""
    return [replace(s, batch=collate([s], device)) for s in samples]


def shuffled_batches(samples, size, device, is_bag):
    """Batches of `size` slides in random order; of bags with another half of the spots each time,
    because few slides make few bags."""
    for rows in torch.randperm(len(samples)).split(size):
        batch = samples[rows[0]].batch
        if batch is None:
            batch = collate([samples[i] for i in rows], device)
        yield half_of(batch) if is_bag else batch


def half_of(batch):
    """A batch with a random half of its spots."""
    is_in = torch.rand(batch["valid"].shape, device=batch["x"].device) < 0.5
    valid = batch["valid"] & is_in
    patches = batch["patches"]._replace(is_real=valid, is_unpadded=False)
    scored = batch["scored"] & is_in[..., None]
    return batch | {"valid": valid, "patches": patches, "scored": scored}


def slides_as_rows(out, batch):
    """Outputs (B, G) and a batch of slides whose mean is predicted -> the same as one matrix (1, B,
    G) whose rows are slides: the mean of the targets, the sums of counts and library."""
    mask = batch["scored"]  # (B, S, G)
    n = mask.sum(1)  # (B, G)
    rows = {
        "y": (batch["y"] * mask).sum(1) / n.clamp(min=1),
        "counts": (batch["counts"] * mask).sum(1),
        "library": (batch["library"] * mask.any(-1)).sum(1),  # (B,)
        "scored": n > 0,
    }
    matrix = {name: value[None] for name, value in rows.items()}
    return {name: value[None] for name, value in out.items()}, matrix


# --------------------------------------------------------------------------------------------------
# Scales
# --------------------------------------------------------------------------------------------------


class Scaler:
    """Mean and spread of features and targets, counts per 10,000 of each gene and the median
    library size, over the scored training spots; genes where measured."""

    def __init__(self, tensors):
        if not all(torch.is_tensor(value) for value in tensors.values()):
            raise TypeError("a part of the scaler is no tensor")
        self.tensors = tensors

    @classmethod
    def fit(cls, samples, by="train"):
        """by: --target_scale; `none` keeps the statistics of `train`."""
        mean, std = hest.mean_and_std([s.x[s.scored] for s in samples])
        depth = torch.cat([s.library[s.scored] for s in samples]).median()
        scale = {"x_mean": mean, "x_std": std, "median_library": depth}
        by = "train" if by == "none" else by
        return cls(scale | hest.target_statistics(samples, by))

    def features(self, sample, scale):
        """The sample with its features as they are, or z-scored by the training spots, by all its
        own spots, or both."""
        if scale == "none":
            return sample
        mean, std = self.tensors["x_mean"], self.tensors["x_std"]
        return replace(sample, x=hest.scaled_features(sample.x, mean, std, scale))

    def to(self, device):
        """The scaler on another device."""
        return Scaler({name: value.to(device) for name, value in self.tensors.items()})

    def standardise_targets(self, y, mask, by):
        """Targets (B, S, G) as they are, in units of their spread over the training spots, or
        z-scored within each slide over the mask."""
        if by == "none":
            return y
        mean, std = self.tensors["y_mean"], self.tensors["y_std"]
        return hest.standardise_targets(y, mask, mean, std, by)

    def mean_counts(self, out, library):
        """mu (B, S, G) of the negative binomial: library / 10,000 x training rate x softplus, which
        is the training rate at the start."""
        return library[..., None] / 1e4 * self.tensors["rate"] * F.softplus(out["genes"] + 0.5413)

    def predicted(self, out, config):
        """Network output -> target units.

        Expected counts of zinb are those of a spot of 10,000 counts (target cp10k) or of the median
        training library (log1p): a spot's own library is the sum of what is to be predicted."""
        if config.loss != "zinb" and config.target_scale == "none":
            return out["genes"]
        if config.loss != "zinb":
            return out["genes"] * self.tensors["y_std"] + self.tensors["y_mean"]
        is_composition = config.target == "cp10k"
        depth = torch.tensor(1e4) if is_composition else self.tensors["median_library"]
        library = depth.to(out["genes"]).expand(out["genes"].shape[:-1])  # (B, S)
        return torch.log1p(self.mean_counts(out, library) * torch.sigmoid(-out["pi"]))


# --------------------------------------------------------------------------------------------------
# Prediction
# --------------------------------------------------------------------------------------------------


def outputs(model, batch, config):
    """The network's outputs of a batch, float32 whatever it computes in."""
    with run.autocast(config, batch["x"].device):
        out = model(**batch)
    return {name: value.float() for name, value in out.items()}


@torch.no_grad()
def predict(models, sample, scaler, config):
    """Mean over models of genes (S, G) or (G,) in target units, and of pathway scores (S, P) or
    None, numpy; eval mode, one slide."""
    device = next(models[0].parameters()).device
    batch, scaler = sample.batch or collate([sample], device), scaler.to(device)
    outs = [outputs(model.eval(), batch, config) for model in models]
    genes = torch.stack([scaler.predicted(out, config)[0] for out in outs]).mean(0)
    scores = None
    if "scores" in outs[0]:
        scores = torch.stack([out["scores"][0] for out in outs]).mean(0).cpu().numpy()
    return genes.cpu().numpy(), scores


def validation_score(model, samples, scaler, config, is_bag):
    """Mean per-slide PCC on held-out training slides, for bags minus the error of the slide mean in
    units of the genes' spread; nan without samples, -inf where no PCC is defined."""
    if not samples:
        return float("nan")
    scores = []
    for s in samples:
        genes = predict([model], s, scaler, config)[0]
        rows, measured = s.scored.numpy(), s.measured.numpy()
        true = s.y.numpy()[rows][:, measured]
        if is_bag:
            error = genes[measured] - true.mean(0)
            spread = scaler.tensors["y_std"].cpu().numpy()[measured]
            scores.append(-float(np.sqrt(np.mean((error / spread) ** 2))))
        else:
            scores.append(metrics.pcc_summary(true, genes[rows][:, measured])["pcc_mean"])
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else -np.inf
