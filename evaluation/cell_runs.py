"""A run on single cells around its method: flags, the cells that are held out, embeddings of all
cells, pictures by chunks, and what is kept of the run.

N cells of the file, n rows, G genes, d wide; the dataset is a `plainst.cell_data.CellDataset`. The
networks are those of the method: a cell model with `image`, `gene` and `fuse`, a context model, a
generator with `condition`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler

import data
from data import DataError
from evaluation import cells as tasks
from evaluation import figures
from plainst import export, run
from plainst.cell_data import PARTS, CellDataset, Normaliser
from plainst.stages import sum_over_processes

MODALITIES = ("img", "gene", "fused")
# clusters of cells without classes
N_CLUSTERS = 8

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def check(config):
    """Raise DataError naming the flag that has an impossible value, or does nothing in this run."""
    one, zero = run.AT_LEAST_ONE, run.AT_LEAST_ZERO
    is_rho = "from 0 to 0.75 (a quarter of the tokens stays), or -1"
    rules = {
        "test_every": (lambda v: v >= 2, "at least 2"),
        "width": run.POSITIVE,
        "buffer": (lambda v: v == -1 or v >= 0, "at least 0, or -1"),
        "rho": (lambda v: v == -1 or 0 <= v <= 0.75, is_rho),
    }
    rules |= dict.fromkeys(("draws", "ode_steps"), one)
    at_least_zero = ("fold", "guidance", "steps_a", "steps_b", "steps_c", "weight_decay")
    rules |= dict.fromkeys((*at_least_zero, "save_every"), zero)
    rules["min_shared"] = (lambda v: 0 <= v <= 1, "from 0 to 1")
    run.check_flags(config, rules)
    if config.predict:
        run.refuse_idle_flags(config, [run.idle_with_predict(config, ("min_shared",))])
        return
    generator = ("path", "rho", "condition", "guidance", "draws", "ode_steps", "steps_c")
    idle = [
        (not config.generate, "with --no-generate", generator),
        (config.condition == "none", "with --condition none", ("guidance",)),
        (True, "without --predict", ("min_shared",)),
    ]
    run.refuse_idle_flags(config, idle)


def size_of(config, sizes):
    """The size of the run: that of --size, with the steps and the merge ratio that are given."""
    size = sizes[config.size]
    given = (config.steps_a, config.steps_b, config.steps_c)
    steps = tuple(own or default for own, default in zip(given, size.steps))
    rho = size.rho if config.rho < 0 else config.rho
    return replace(size, steps=steps, rho=rho)


def place(config):
    """Folders of the run: what is scored; size, path, and every other flag that is not at its
    default."""
    in_words = ("size", "path", "fold", "score")
    variant = run.variant(config, [config.size, config.path], in_words)
    return f"{config.score}-fold{config.fold}", variant


def variant(config):
    """Folder name of the run, the last part of its place."""
    return place(config)[1]


# --------------------------------------------------------------------------------------------------
# Cells and their split
# --------------------------------------------------------------------------------------------------


def log_moments(counts, total):
    """Mean and variance (G,) of log1p of counts (n, G) CSR that are scaled to `total` a cell."""
    return data.mean_var(data.normalise_log1p(counts, target_sum=total))


def without_small_sections(cells, split, least):
    """The split without the cells of a section that has fewer than `least` of them in a part, too
    few for a niche; says which. Raises DataError where a part is empty then."""
    for part in PARTS:
        mask = getattr(split, part).copy()
        sizes = np.bincount(cells.section[mask], minlength=len(cells.sections))
        small = np.flatnonzero((sizes > 0) & (sizes < least))
        for section in small:
            run.say(
                f"{cells.source}: section {cells.sections[section]} has {sizes[section]} cells in "
                f"the {part} part, fewer than a niche of {least}: they are left out"
            )
        mask &= ~np.isin(cells.section, small)
        if len(small) and not mask.any():
            raise DataError(
                f"{cells.source}: no section has a niche of {least} cells in the {part} part: "
                "make the blocks wider, or give a file with more cells"
            )
        split = replace(split, **{part: mask})
    return split


def check_pictures(config, size, cells):
    """What the crops of the file are, in words. A file without any switches off what needs them:
    stage C and the reconstruction of patches. Raises DataError where patches do not fit the crops,
    or a flag is about pictures that are not there."""
    if cells.crops is None:
        needs = ("generate", "mae", "path", "rho", "condition", "guidance", "draws", "ode_steps")
        case = f"on {config.data}, which holds no pictures"
        run.refuse_idle_flags(config, [(True, case, (*needs, "steps_c"))])
        config.generate = config.mae = False
        return "no pictures"
    channels, side = cells.crops.shape[1:3]
    for patch in (size.patch, size.decoder_patch):
        if side % patch or side // patch % 2:
            raise DataError(
                f"{config.data}: crops of {side} px cannot be cut into an even number of patches "
                f"of {patch} px: convert with another crop size"
            )
    return f"crops {channels} x {side} x {side}"


def load(config, size, device):
    """CellDataset with the split that is scored: as test cells the test part, or with --score val
    the validation part."""
    cells = data.load_cells(config.data)
    case = f"on {config.data}: of three sections or more whole ones are held out"
    run.refuse_idle_flags(config, [(len(cells.sections) >= 3, case, ("width", "buffer"))])
    pictures = check_pictures(config, size, cells)
    val = 0 if config.score == "test" else 4
    buffer = None if config.buffer == -1 else config.buffer
    split = data.cell_split(cells, config.test_every, config.width, None, buffer, val, config.fold)
    if config.score == "val":
        split.test, split.val, split.name = split.val, np.zeros_like(split.val), f"{split.name}-val"
    split = without_small_sections(cells, split, size.niche + 1)
    normalise = Normaliser().fit(cells.counts[np.flatnonzero(split.train)], log_moments)
    dataset = CellDataset(cells, split, normalise, size.niche, size.tissue, device)
    n_train, n_scored = len(dataset.rows["train"]), len(dataset.rows["test"])
    run.say(
        f"{Path(config.data).name}: {n_train} cells train, {n_scored} are scored ({split.detail}); "
        f"{cells.n_genes} genes, {pictures}"
    )
    return dataset


# --------------------------------------------------------------------------------------------------
# Embeddings of all cells, expression read from them, pictures
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model, dataset, rows, hidden=None, modality=None, chunk=512):
    """Embeddings of `rows` from the full view: {modality: (n, d)} for img, gene, fused, or the one
    asked for; img is 0 where the file has no pictures. hidden (n, G) bool: genes that are
    hidden."""
    wanted = MODALITIES if modality is None else (modality,)
    out = {name: [] for name in wanted}
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        mask = None if hidden is None else hidden[start : start + chunk]
        x_img = x_gene = None
        if dataset.has_pictures and set(wanted) & {"img", "fused"}:
            x_img = model.image(dataset.images(part))
        if set(wanted) & {"gene", "fused"}:
            on_device = None if mask is None else mask.to(dataset.device)
            x_gene = model.gene(*dataset.expression(part, mask), on_device)
        seen = {"img": (x_img, None), "gene": (None, x_gene), "fused": (x_img, x_gene)}
        for name in wanted:
            if seen[name] == (None, None):
                out[name].append(
                    torch.zeros(len(part), model.norm.bias.shape[0], device=dataset.device)
                )
                continue
            z, *_ = model.fuse(*seen[name])
            out[name].append(z.float())
    return {name: torch.cat(values) for name, values in out.items()}


def embed_all(model, dataset, hidden=None, modality=None):
    """The same for all cells of the file that are in a part, (N, d) with zeros elsewhere."""
    rows = torch.as_tensor(dataset.used_rows)
    mask = None if hidden is None else hidden[rows]
    out = {}
    for name, z in embed(model, dataset, dataset.used_rows, mask, modality).items():
        everyone = z.new_zeros(dataset.cells.n_cells, z.shape[1])
        out[name] = everyone.index_copy(0, rows.to(z.device), z)
    return out


@torch.no_grad()
def context_genes(dataset, model, z_own, z_all, rows, level=(True, True), chunk=512):
    """What the context model says of `rows` from z_own (n, d) or None (shows nothing of itself) and
    the surroundings' embeddings z_all (N, d), as far as `level` says (niche, tissue): expression
    (n, G) of its head, and the head's hidden layer (n, 2d), numpy."""
    squares, genes, hidden = dataset.square_means(z_all), [], []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        own = None if z_own is None else z_own[start : start + chunk]
        has_context = torch.tensor(level, device=z_all.device).expand(len(part), -1)
        u = model(own, *dataset.surroundings(z_all, squares, part), has_context)
        genes.append(model.heads(u)[0])
        hidden.append(model.trunk(u))
    return [torch.cat(a).cpu().numpy() for a in (genes, hidden)]


@torch.no_grad()
def representations(dataset, cell, context, hidden=None):
    """Frozen embeddings of all cells: z (with surroundings), z_niche and z_tissue (with one of
    them), z_cell, z_img, z_gene, each (N, d) numpy. hidden (N, G) bool: genes that are hidden."""
    embedded, rows = embed_all(cell, dataset, hidden), dataset.used_rows
    fused = embedded["fused"]
    squares, out = dataset.square_means(fused), {}
    for name, level in (("z", "all"), ("z_niche", "niche"), ("z_tissue", "tissue")):
        z, reads = torch.zeros_like(fused), torch.tensor(tasks.LEVELS[level], device=fused.device)
        for part in np.array_split(rows, -(-len(rows) // 512)):
            surroundings = dataset.surroundings(fused, squares, part)
            z[part] = context(fused[part], *surroundings, reads.expand(len(part), -1))
        out[name] = z
    out |= {"z_cell": fused, "z_img": embedded["img"], "z_gene": embedded["gene"]}
    return {name: values.cpu().numpy() for name, values in out.items()}


def learned_weights(models):
    """How far the weights that begin at .1 have moved: gates of niche and tissue, mean absolute
    scale of the fusion per direction; {name: float}."""
    cell, context = models["cell"], models["context"]
    scores = {}
    for name, part, gate in zip(
        ("niche", "tissue"), (context.niche, context.tissue), context.gates.tolist()
    ):
        if part is not None:
            scores[f"gate_{name}"] = gate
    for name, blocks in (("image", cell.to_img), ("genes", cell.to_gene)):
        if len(blocks):
            scales = [block.scale.detach().abs().mean().item() for block in blocks]
            scores[f"fusion_scale_{name}"] = float(np.mean(scales))
    return scores


class Conditions:
    """The generator's condition of any cell, from counts alone: cached gene-only embeddings and
    expression of all cells of the parts."""

    def __init__(self, dataset, cell):
        self.dataset = dataset
        self.z = embed_all(cell, dataset, modality="gene")["gene"]  # (N, d)
        self.squares = dataset.square_means(self.z)
        self.expression = dataset.all_expression()  # (N, G + 1)

    def __call__(self, model, rows):
        """rows (B,) -> condition tokens (B, M + 4, e)."""
        rows = torch.as_tensor(rows)
        if model.sees == "none":
            return model.null.expand(len(rows), -1, -1)
        own = self.expression[rows]
        beside = self.expression[self.dataset.niche[rows]].mean(1)  # (B, G + 1)
        near, _, far, _, exists = self.dataset.surroundings(self.z, self.squares, rows)
        return model.condition(
            own[:, :-1], own[:, -1:], beside[:, :-1], beside[:, -1:], near, far, exists
        )


@torch.no_grad()
def painted(dataset, paint, rows, draws, seed, chunk=256):
    """`draws` pictures of each cell of `rows`, (draws, n, C, S, S) uint8 numpy; paint(noise (b, C,
    S, S), rows (b,)) -> pictures in [-1, 1]. Noise is drawn per draw and chunk; processes share the
    chunks."""
    rank, world = run.processes()
    channels, side = dataset.shape
    out = torch.zeros(draws, len(rows), channels, side, side, dtype=torch.uint8)
    jobs = [(draw, start) for draw in range(draws) for start in range(0, len(rows), chunk)]
    for draw, start in jobs[rank::world]:
        part = rows[start : start + chunk]
        generator = torch.Generator().manual_seed((seed * 1000 + draw) * 10_000_019 + start + 5)
        noise = torch.randn(len(part), channels, side, side, generator=generator)
        x = paint(noise.to(dataset.device), part)
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        out[draw, start : start + chunk] = pixels.cpu()
    return sum_over_processes(out, dataset.device).numpy()


def method_of(dataset, models, generate_images):
    """The trained models as the tasks call them: embeddings, expression, pictures."""
    cell, context = models["cell"], models["context"]

    def embed_modality(modality, hidden=None):
        return embed_all(cell, dataset, hidden, modality)[modality]

    def predict_genes(z, rows, level):
        return context_genes(dataset, context, z[rows], z, rows, level)

    return tasks.Method(embed_modality, predict_genes, generate_images)


# --------------------------------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------------------------------


def score(config, dataset, models, generate_images, record):
    """Every task -> TaskResult of all together, embeddings {name: (N, d)} of all cells. Prints the
    table."""
    method = method_of(dataset, models, generate_images)
    results = []
    if config.generate:
        results.append(tasks.task_generation(dataset, method, config.seed, config.draws))
        record.lap("generation")
    z = representations(dataset, models["cell"], models["context"])
    results.append(tasks.task_imputation(dataset, method, config.seed))
    if dataset.has_pictures:
        results.append(tasks.task_image_to_genes(dataset, method))
    else:
        z.pop("z_img")
    results.append(tasks.task_labels(dataset, z, config.seed))
    record.lap("tasks")
    result = tasks.joined(results)
    result.scores |= learned_weights(models)
    tasks.print_scores("spatia", result.scores, result.baselines)
    return result, z


def clusters_of(cells, z, rows, seed):
    """(N,) k-means clusters of the embeddings z (N, d) of the cells `rows`, -1 for the others; as
    many as the file has classes, else N_CLUSTERS. Nobody's score reads them."""
    out, x = np.full(cells.n_cells, -1), StandardScaler().fit_transform(z[rows])
    n_clusters = min(len(cells.classes) or N_CLUSTERS, len(rows))
    out[rows] = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(x)
    return out


def every_cell(dataset, cell, context, seed, hidden=None):
    """Arrays of all cells of the file, in its order, whatever part they are in: ids, xy, labels, z
    (N, d) in their whole surroundings, clusters (N,). hidden (N, G) bool: genes that are hidden."""
    whole, cells = dataset.unsplit(), dataset.cells
    z = representations(whole, cell, context, hidden)["z"]
    arrays = {"ids": cells.ids, "xy": cells.xy, "labels": cells.labels, "z": z}
    return arrays | {"clusters": clusters_of(cells, z, whole.used_rows, seed)}


def arrays_of(dataset, models, z, arrays, seed):
    """The arrays of the record: those of `every_cell`; scored (n,), the rows of the scored cells,
    and of these what the tasks left and their embeddings inside their part, z as z_held_out."""
    cells, rows = dataset.cells, dataset.rows["test"]
    out = arrays | {"genes": cells.genes, "scored": rows}
    if dataset.has_pictures:
        out["crops"] = cells.crops[rows]
    out |= {"z_held_out" if name == "z" else name: v[rows] for name, v in z.items()}
    return out | every_cell(dataset, models["cell"], models["context"], seed)


def checkpoint(config, dataset, models):
    """Everything that reads new cells with the trained models: loads with weights_only=True."""
    return {
        "config": run.resumable(config),
        "genes": [str(gene) for gene in dataset.cells.genes],
        "normaliser": dataset.normalise.state(),
        "channels": list(dataset.cells.channels),
        "shape": list(dataset.shape),
        **{name: model.state_dict() for name, model in models.items()},
    }


def finish(config, record, dataset, models, losses, result, z):
    """Write figures, model.pt, tables and the record of a run; losses {stage: every step's}, result
    and z as `score` gives them."""
    result.scores |= {f"loss_{k}": float(np.mean(v[-50:])) for k, v in losses.items()}
    arrays = arrays_of(dataset, models, z, result.arrays, config.seed)
    if record.rank == 0:
        figures.draw_cells(record, dataset, result.arrays, z["z"], losses)
    state = checkpoint(config, dataset, models)
    files = {"model.pt": lambda file: torch.save(state, file)}
    files |= export.files_of("spatia", arrays, [dataset.cells], config)
    n_params = sum(p.numel() for model in models.values() for p in model.parameters())
    counts = {"n_train": len(dataset.rows["train"]), "n_scored": len(dataset.rows["test"])}
    scores = result.scores, result.baselines
    record.finish(*scores, arrays, n_params, dataset.split, files, **counts)
