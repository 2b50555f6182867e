"""The protocol of domains without labels: rules of the flags, slide, inputs, number of domains,
and what is read off an embedding."""

from pathlib import Path

import numpy as np
import scipy.sparse as sp

import data
from data import DataError
from evaluation import baselines, clustering, downstream
from plainst import run, stain
from plainst.features import input_files

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

AT_LEAST_TWO = (lambda v: v >= 2, "2 or more")
SHARE = (lambda v: 0 <= v <= 1, "from 0 to 1")
# flags of the fusion with the image
FUSION = (
    *("encoder", "crop_um", "colour", "smooth", "attention", "m", "alpha", "fused_dim", "heads"),
    *("fusion_epochs", "fusion_lr", "batch", "tau", "fusion_mask", "lambda_keep", "readout"),
)


def is_number_of_domains(text):
    """Whether --n_domains can be this."""
    return text in ("oracle", "bic") or (text.isdigit() and int(text) > 0)


def check(config):
    """Raise DataError, naming the flag, for a value that no run can use, or for one that does
    nothing beside the others."""
    at_least_one = ("k", "epochs", "dec_update", "m", "heads", "fusion_epochs", "n_init")
    at_least_zero = (
        *("tile", "weight_decay", "dec_epochs", "dec_tol", "diffusion_steps", "permutations"),
        *("lambda_x", "lambda_g", "lambda_mask", "lambda_gan", "lambda_dec"),
    )
    positive = ("lr", "fusion_lr", "crop_um", "tau", "lambda_keep")
    rules = dict.fromkeys((*at_least_one, "diffusion_k"), run.AT_LEAST_ONE)
    rules |= dict.fromkeys(at_least_zero, run.AT_LEAST_ZERO)
    rules |= dict.fromkeys(positive, run.POSITIVE)
    rules |= dict.fromkeys(("mask_rate", "alpha", "smooth", "fusion_mask"), SHARE)
    rules |= dict.fromkeys(("n_top_genes", "n_pcs", "batch"), AT_LEAST_TWO)
    rules |= {
        "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
        "n_domains": (is_number_of_domains, "oracle, bic or a positive number"),
        "fused_dim": (
            lambda v: v >= 1 and v % max(config.heads, 1) == 0,
            "a positive multiple of --heads",
        ),
    }
    run.check_flags(config, rules)
    run.refuse_idle_flags(config, idle_flags(config))


def idle_flags(config):
    """Rules for the flags that do nothing beside the others, as `run.refuse_idle_flags` takes
    them. With --mask_mode none the masked consistency still reads --mask_rate of the spots."""
    has_files = data.is_features_file(config.encoder)
    pixels = ("crop_um", "colour")
    return [
        (config.image == "off", "with --image off", FUSION),
        (config.image == "zero", "with --image zero", (*pixels, "smooth")),
        (has_files, "with ready-made features of --encoder", pixels),
        (config.hvg == "none", "with --hvg none", ("n_top_genes",)),
        (config.mask_rate == 0, "with --mask_rate 0", ("mask_mode", "lambda_mask")),
        (config.gan == "off", "with --gan off", ("lambda_gan",)),
        (not config.dec, "with --no-dec", ("dec_epochs", "dec_update", "dec_tol", "lambda_dec")),
        (config.diffusion_steps == 0, "with --diffusion_steps 0", ("diffusion_k",)),
        (config.permutations == 0, "with --permutations 0", ("lr_pairs",)),
    ]


def variant(config):
    """Folder name of a run: its preset, and the flags that differ from it."""
    return run.variant(config, [], ["figures", "fast"], files=["encoder", "order", "lr_pairs"])


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


def preprocess(slide, config):
    """X (N, P) float32: principal components of the z-scored selected genes. They are not rescaled,
    so a mean square error over them is a variance-weighted one: the first components dominate.
    Raises DataError where nothing varies."""
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
    z = data.Standardise(clip).fit(x).scaled(x)
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
    the colour normalisation. --image permuted: those of another spot; zero: none."""
    if config.colour == "reference":
        slide = stain.normalised_slide(slide)
    cache = config.cache or Path(config.runs) / ".features"
    v = data.image_features(slide, config.encoder, config.crop_um, cache=cache, device=device)
    return (v - v.mean(0)) / np.maximum(v.std(0), 1e-6)


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
        data.crops(slide, np.arange(1), config.crop_um)
    return True


class Task:
    """The slide of a run and what it asks for. Raises DataError, before any work, for what the
    slide cannot give."""

    def __init__(self, config):
        self.config = config
        self.slide = data.load_slide(config.data, config.slice or None, **config.columns())
        self.has_image = has_image(self.slide, config)
        self.output = "fused" if self.has_image else "gene"
        if self.has_image and config.m > self.slide.n_spots:
            raise DataError(
                f"--m {config.m} exceeds the {self.slide.n_spots} spots of slide "
                f"{self.slide.sample}: choose a smaller m"
            )
        self.ranks = downstream.class_ranks(self.slide, config.order)
        self.pairs = downstream.PAIRS
        if config.lr_pairs:
            self.pairs = downstream.read_pairs(config.lr_pairs)
        if config.n_domains != "bic":
            clustering.number_of_domains(config.n_domains, self.slide)

    def files(self):
        """Paths of all files that can change a number of the run."""
        encoder = self.config.encoder if self.has_image else ""
        return input_files([self.slide], encoder, [self.config.lr_pairs])

    def number_of_domains(self, z):
        """Number of domains, and how it was chosen; z (N, d) is read by --n_domains bic."""
        return clustering.number_of_domains(self.config.n_domains, self.slide, z, self.config.seed)

    def score_baselines(self, x, k):
        """{name: scores} of the baselines on the components x (N, P); prints a row each."""
        c, xy = self.config, self.slide.xy
        scores = {}
        for name, found in baselines.unsupervised_domains(x, xy, k, c.n_init, c.seed).items():
            scores[name] = clustering.domain_scores(self.slide, found)
            print(clustering.score_row(name, scores[name]))
        return scores

    def evaluate(self, embeddings, k, record):
        """Domains of every embedding {name: (N, d)} and what is read off those of the output:
        arrays, metrics, texts."""
        c, slide = self.config, self.slide
        arrays, scores = clustering.domains_of(
            embeddings, slide, k, self.output, c.n_init, c.seed, c.diffusion_steps, c.diffusion_k
        )
        record.lap("clustering")
        arrays |= {
            "domains": arrays[f"labels_{self.output}"],
            "labels": slide.labels,
            "classes": np.array(slide.classes, dtype=str),
            "barcodes": slide.barcodes,
            "xy": slide.xy,
        }
        more, more_scores, text = downstream.downstream(
            slide,
            log_matrix(slide, c),
            embeddings[self.output],
            arrays["domains"],
            self.ranks,
            self.pairs,
            c.root_gene,
            c.permutations,
        )
        record.lap("downstream")
        return arrays | more, scores | more_scores | {"k": k}, text
