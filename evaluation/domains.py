"""The protocol of domains without labels: rules of the flags, slide, inputs, number of domains,
and what is read off an embedding."""

from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

import data
from data import DataError
from evaluation import baselines, clustering, downstream, joint, signalling
from plainst import run, stain
from plainst.features import input_files
from plainst.graphs import Graph
from plainst.readers.h5ad import read_obsm

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

AT_LEAST_TWO = (lambda v: v >= 2, "2 or more")
SHARE = (lambda v: 0 <= v <= 1, "from 0 to 1")
# flags of the fusion with the image
FUSION = (
    *("encoder", "direction", "alpha", "m", "fused_dim", "fusion_epochs", "batch"),
    "readout",
)
CROP_UM = 310.0  # side of a crop: 64 pixels of the hires image of DLPFC 151673
DIFFUSION_K = 7  # neighbours of the label diffusion
FEWEST_FOR_STABILITY = 200  # spots
LATTICE_K, CELLS_K = 6, 30  # neighbours of --k 0


def is_number_of_domains(text):
    """Whether --n_domains can be this."""
    return text in ("oracle", "bic", "stability") or (text.isdigit() and int(text) > 0)


def check(config):
    """Raise DataError, naming the flag, for a value that no run can use, or for one that does
    nothing beside the others."""
    at_least_one = ("epochs", "m", "fusion_epochs", "n_models", "n_starts")
    at_least_zero = (
        *("k", "tile", "weight_decay", "dec_clusters", "dec_epochs", "diffusion_steps"),
        *("self_weight", "permutations", "lambda_g", "lambda_gan"),
    )
    rules = dict.fromkeys(at_least_one, run.AT_LEAST_ONE)
    rules |= dict.fromkeys(at_least_zero, run.AT_LEAST_ZERO)
    rules |= {"lr": run.POSITIVE}
    rules |= dict.fromkeys(("mask_rate", "alpha"), SHARE)
    rules |= dict.fromkeys(("n_top_genes", "n_pcs", "batch"), AT_LEAST_TWO)
    rules |= {
        "n_domains": (is_number_of_domains, "oracle, bic, stability or a positive number"),
        "fused_dim": (lambda v: v >= 8 and v % 8 == 0, "a positive multiple of 8, one for a head"),
    }
    run.check_flags(config, rules)
    run.refuse_idle_flags(config, idle_flags(config))


def idle_flags(config):
    """Rules for the flags that do nothing beside the others, as `run.refuse_idle_flags` takes
    them. With --mask_mode none the masked consistency still reads --mask_rate of the spots."""
    return [
        (config.image == "off", "with --image off", FUSION),
        (config.image == "zero", "with --image zero", ("encoder",)),
        (config.direction != "both", f"with --direction {config.direction}", ("alpha",)),
        (config.hvg == "none", "with --hvg none", ("n_top_genes",)),
        (bool(config.embedding), "with --embedding", ("norm", "hvg", "n_top_genes", "n_pcs")),
        (config.mask_rate == 0, "with --mask_rate 0", ("mask_mode",)),
        (config.gan == "off", "with --gan off", ("lambda_gan",)),
        (not config.dec, "with --no-dec", ("dec_clusters", "dec_epochs")),
        (config.diffusion_steps == 0, "with --diffusion_steps 0", ("self_weight",)),
        (config.permutations == 0, "with --permutations 0", ("lr_pairs",)),
    ]


def variant(config):
    """Folder name of a run: its preset, and the flags that differ from it."""
    return run.variant(
        config, [], ["figures", "fast"], files=["encoder", "embedding", "order", "lr_pairs"]
    )


def form_of(config, has_image):
    """What the record calls the settings: the preset, and of `paper` what is smaller than there."""
    if config.preset == "paper" and has_image and config.encoder == "handmade":
        return "paper-small"
    return config.preset


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


def inputs(slide, config, part=None):
    """X (N, P) float32: `preprocess` of the counts, or the vectors of --embedding, each column with
    mean 0, the whole with variance 1. part (N,): number of the slice of each spot in a joint run,
    of which each has mean 0."""
    x = vectors(slide, config.embedding) if config.embedding else preprocess(slide, config, part)
    for number in range(1 if part is None else part.max() + 1):
        rows = slice(None) if part is None else part == number
        if part is not None or config.embedding:
            x[rows] -= x[rows].mean(0)
    if config.embedding:
        if not x.std() > 0:
            raise DataError(f"the vectors of --embedding {config.embedding} are all the same")
        x = x / x.std()
    return x


def vectors(slide, name):
    """(N, D) float32 frozen vectors of the spots: of a .npy or .npz file, or of the obsm of the
    slide's h5ad. Raises DataError for another number of spots or a key that is not there."""
    if data.is_features_file(name):
        return data.read_embedding(name, slide)
    if not str(slide.source).endswith(".h5ad"):
        raise DataError(
            f"--embedding {name} is no .npy or .npz file, and slide {slide.sample} is no h5ad with "
            "an obsm: give a file"
        )
    return read_obsm(slide.source, name, slide.barcodes)


def preprocess(slide, config, part=None):
    """X (N, P) float32: principal components of the z-scored selected genes. They are not rescaled,
    so a mean square error over them is a variance-weighted one: the first components dominate.
    Genes are z-scored in each slice of a joint run, part (N,), by itself. Raises DataError where
    nothing varies."""
    # genes seen in too few spots are noise
    is_seen = slide.counts.getnnz(axis=0) >= min(10, max(2, slide.n_spots // 50))
    counts = slide.counts[:, np.flatnonzero(is_seen)]
    library_size = slide.library_size if config.library == "given" else None
    clip = 10.0
    if config.norm == "log1p":
        x = data.normalise_log1p(counts, library_size)  # (N, G)
    else:
        x, clip = per_million(counts, library_size), np.inf
    variance = data.mean_var(x)[1]
    chosen = chosen_genes(counts, variance, config)
    if len(chosen) < 2 or slide.n_spots < 3:
        raise DataError(
            f"slide {slide.sample} has {len(chosen)} genes that vary over {slide.n_spots} "
            "spots: domains need more"
        )
    x = x[:, chosen]
    part = np.zeros(slide.n_spots, int) if part is None else part
    slices = [x[part == number] for number in range(part.max() + 1)]
    z = sp.vstack([data.Standardise(clip).fit(rows).scaled(rows) for rows in slices]).tocsr()
    x = data.truncated_pca(z, config.n_pcs, seed=0)  # (N, P)
    # a component without variance is round-off
    return x[:, x.std(0) > 1e-4 * x.std(0).max()]


def per_million(counts, library_size=None):
    """(N, G) CSR of counts per million, without a logarithm."""
    x = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    total = np.asarray(x.sum(1)).ravel() if library_size is None else library_size
    return (sp.diags((1e6 / np.maximum(total, 1)).astype(np.float32)) @ x).tocsr()


def chosen_genes(counts, variance, config):
    """Columns of the genes that vary and that --hvg chooses, in file order."""
    if config.hvg == "seurat_v3":
        columns = data.hvg_seurat_v3(counts, config.n_top_genes)
    elif config.hvg == "variance":
        columns = np.sort(np.argsort(-variance, kind="stable")[: config.n_top_genes])
    else:
        columns = np.arange(len(variance))
    return columns[variance[columns] > 0]


def log_matrix(slide, config):
    """(N, G) CSR of log1p of counts per 10,000, for marker genes and ligand-receptor scores."""
    library_size = slide.library_size if config.library == "given" else None
    return data.normalise_log1p(slide.counts, library_size)


def image_features(slide, config, device):
    """(N, D) float32 frozen image features of every spot, each column with mean 0 and std 1, after
    the colour normalisation. --image permuted: those of another spot; noise: normal numbers; zero:
    nothing."""
    slide = stain.normalised_slide(slide)
    cache = config.cache or Path(config.runs) / ".features"
    f = data.image_features(slide, config.encoder, CROP_UM, cache=cache, device=device)
    f = ((f - f.mean(0)) / np.maximum(f.std(0), 1e-6)).astype(np.float32)
    rng = np.random.default_rng(config.seed)
    if config.image == "permuted":
        return f[rng.permutation(len(f))]
    if config.image == "noise":
        return rng.standard_normal(f.shape, np.float32)
    return np.zeros_like(f) if config.image == "zero" else f


def neighbourhood_size(xy):
    """6 neighbours on a lattice, 30 among cells: of 6 cells many belong to another type than their
    domain is known for. A lattice is where the nearest other spot is equally far everywhere."""
    gap = data.distances(xy, data.knn_table(xy, 1))[:, 0]  # (N,)
    low, high = np.quantile(gap, (0.1, 0.9))
    if high <= 1.2 * max(low, 1e-9):
        return min(LATTICE_K, len(xy) - 1)
    return min(CELLS_K, len(xy) - 1)


@torch.no_grad()
def fuse(model, z, f, batches):
    """H (N, H) and entropy (N,) in evaluation mode, in pieces of spots that lie together."""
    model.eval()
    h = torch.empty(len(z), model.config.fused_dim, device=z.device)
    entropy = torch.full((len(z),), float("nan"), device=z.device)
    for spots in batches.compact(2048):
        h[spots], _, _, attention = model(z, f, batches.view(spots))
        if batches.m > 1:
            surprise = -(attention * attention.clamp_min(1e-12).log()).sum(1)  # (B, heads)
            entropy[spots] = surprise.mean(1) / np.log(batches.m)
    return h, entropy.cpu().numpy()


LATENT_SHARE = 0.7  # of Z in the read-out `latent`


def latent_readout(z, h):
    """.7 Z + .3 P H, of which the released code clusters a linear image: its P is random, too, and
    no loss reaches it. z (N, 32), h (N, H) -> (N, 32)."""
    p = nn.Linear(h.shape[1], z.shape[1]).to(h.device)
    with torch.no_grad():
        return LATENT_SHARE * z + (1 - LATENT_SHARE) * p(h)


def has_image(slide, config):
    """Whether there is an image to fuse with. Raises DataError where one was asked for and there is
    none."""
    if config.image == "off":
        return False
    is_from_file = data.is_features_file(config.encoder)
    if slide.patches is None and slide.image is None and not is_from_file:
        if config.image != "auto":
            raise DataError(
                f"slide {slide.sample} has no image for --image {config.image}: put "
                "tissue_hires_image.png into spatial/, or use --image off"
            )
        print(f"slide {slide.sample} has no image: gene-only, Stage III is left out")
        return False
    # complain before the work starts
    if is_from_file:
        data.read_embedding(config.encoder, slide)
    elif slide.patches is None:
        if config.image == "auto" and not slide.um_per_px:
            print(
                f"slide {slide.sample} has an image but no physical scale: gene-only, Stage III "
                "is left out"
            )
            return False
        data.crops(slide, np.arange(1), CROP_UM)
    return True


class Task:
    """The slide of a run and what it asks for. Raises DataError, before any work, for what the
    slide cannot give."""

    def __init__(self, config):
        self.config = config
        names = [name for name in config.slice.split(",") if name] or [None]
        slides = [data.load_slide(config.data, name, **config.columns()) for name in names]
        self.slide, self.part = slides[0], None
        if len(slides) > 1:
            self.slide, self.part = joint.join(slides)
            if config.embedding:
                raise DataError("--embedding is of one slide: leave it out of a joint run")
        self.has_image = has_image(self.slide, config)
        self.output = "fused" if self.has_image else "gene"
        if self.has_image and config.m > self.slide.n_spots:
            raise DataError(
                f"--m {config.m} exceeds the {self.slide.n_spots} spots of slide "
                f"{self.slide.sample}: choose a smaller m"
            )
        # mixtures that were fitted while a latent was chosen, and how far those differ
        self.fitted, self.spread = {}, {}
        self.facts = {"form": form_of(config, self.has_image)}
        self.ranks = downstream.class_ranks(self.slide, config.order)
        self.pairs = signalling.PAIRS
        if config.lr_pairs:
            self.pairs = signalling.read_pairs(config.lr_pairs)
        if config.n_domains == "stability" and self.slide.n_spots < FEWEST_FOR_STABILITY:
            raise DataError(
                f"--n_domains stability needs at least {FEWEST_FOR_STABILITY} spots, slide "
                f"{self.slide.sample} has {self.slide.n_spots}: give a number"
            )
        if config.n_domains not in ("bic", "stability"):
            clustering.number_of_domains(config.n_domains, self.slide)

    def files(self):
        """Paths of all files that can change a number of the run."""
        encoder = self.config.encoder if self.has_image else ""
        more = [self.config.lr_pairs]
        if data.is_features_file(self.config.embedding):
            more.append(self.config.embedding)
        return input_files([self.slide], encoder, more)

    def inputs(self):
        """X (N, P) float32."""
        return inputs(self.slide, self.config, self.part)

    def graph(self, device):
        """The `Graph` of the slide; what is in pieces is told."""
        k, name = self.config.k or neighbourhood_size(self.slide.xy), self.slide.sample
        self.facts["k_neighbours"] = k
        graph = Graph(self.slide.xy, k, device, name)
        if graph.pieces > 1:
            print(
                f"the {k}-neighbour graph of slide {name} is in {graph.pieces} pieces: Stage I "
                "passes nothing between them"
            )
        self.facts["graph_pieces"] = graph.pieces
        return graph

    def number_of_domains(self, z):
        """Number of domains; z (N, d) is read by --n_domains bic."""
        choice, seed = self.config.n_domains, self.config.seed
        if choice == "stability":
            k, curve = clustering.stable_k(z, self.config.n_starts, seed)
            self.facts |= {"k_chosen_by": choice, "stability": curve}
            return k
        k, self.facts["k_chosen_by"] = clustering.number_of_domains(choice, self.slide, z, seed)
        return k

    def score_baselines(self, x, k):
        """{name: scores} of the baselines on the components x (N, P); prints a row each."""
        c, xy = self.config, self.slide.xy
        scores, near = {}, self.facts["k_neighbours"]
        found_by = baselines.unsupervised_domains(x, xy, k, c.n_starts, c.seed, near)
        for name, found in found_by.items():
            scores[name] = clustering.domain_scores(self.slide, found)
            print(clustering.score_row(name, scores[name]))
        return scores

    def diffuse(self, labels, xy):
        """Domains (N,) after the label diffusion of the flags."""
        c = self.config
        return clustering.diffuse_labels(labels, xy, c.diffusion_steps, DIFFUSION_K, c.self_weight)

    def choose(self, latents, k):
        """Number of the latent [(N, d)] that is read further. Of several, `coherent_half` of the
        starts of their mixtures votes on the domains, and the first of it names the latent; of one,
        the likeliest start is taken later."""
        if len(latents) == 1:
            return 0
        c, xy = self.config, self.slide.xy
        candidates = clustering.candidates_of(
            latents, xy, k, c.n_starts, c.seed, lambda labels: self.diffuse(labels, xy)
        )
        half, agreement = clustering.coherent_half(candidates)
        first = candidates[half[0]]
        smooth, share = clustering.vote([candidates[i].smooth for i in half])
        self.fitted["gene"] = (first.raw, smooth, share)
        self.spread = clustering.spread_of(candidates, agreement, half[0], self.slide.labels)
        return first.model

    def scores_by_slice(self, found):
        """{<metric>_<slice>: value} of the domains (N,) of a joint run."""
        scores = {}
        for number, name in enumerate(self.slide.sample.split("+")):
            rows = self.part == number
            own = clustering.domain_scores(self.slide.subset(rows), found[rows])
            print(clustering.score_row(name, own))
            scores |= {f"{metric}_{name}": value for metric, value in own.items()}
        return scores

    def evaluate(self, embeddings, components, k, record):
        """Domains of every embedding {name: (N, d)} and what is read off those of the output:
        arrays, metrics, and files {name: function that writes}. components (N, P)."""
        c, slide = self.config, self.slide
        arrays, scores = clustering.domains_of(
            embeddings, slide, k, self.output, c.n_starts, c.seed, self.diffuse, self.fitted
        )
        scores |= self.spread
        scores["r2_from_z"] = clustering.linear_r2(embeddings["gene"], embeddings[self.output])
        if self.part is not None:
            scores |= self.scores_by_slice(arrays[f"labels_{self.output}"])
            arrays["slice"] = self.part
        record.lap("clustering")
        arrays |= {
            "domains": arrays[f"labels_{self.output}"],
            "labels": slide.labels,
            "classes": np.array(slide.classes, dtype=str),
            "barcodes": slide.barcodes,
            "xy": slide.xy,
        }
        x, found = log_matrix(slide, c), arrays["domains"]
        times, root = {}, "none: fewer than 20 spots"
        if slide.n_spots >= 20:
            moving = {name: h for name, h in embeddings.items() if np.ptp(h, axis=0).any()}
            times, root = downstream.compared_times(
                slide, x, moving, self.output, components, found, c.root_gene
            )
        print(f"pseudotime starts in: {root}")
        more, more_scores, files = downstream.downstream(
            slide, x, times, found, self.ranks, self.pairs, c.permutations
        )
        self.facts |= {"output": f"{self.output} + diffusion", "pseudotime_root": root}
        record.lap("downstream")
        return arrays | more, scores | more_scores | {"k": k}, files
