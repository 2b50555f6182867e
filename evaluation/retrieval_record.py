"""What a run of expression by retrieval prints and writes: table, figures, checkpoint, atlas."""

import numpy as np
import scipy.sparse as sp
import torch

from evaluation import figures, hest
from evaluation.retrieval_task import encoder_name
from plainst import export, retrieval, run

# columns of the printed table
COLUMNS = (
    *("pcc_mean", "pcc_pooled", "pcc_heg", "pcc_hvg", "pcc_marker", "variance_ratio_median"),
    *("rmse", "gene_gene_pearson", "rate_pcc"),
)


def report(task, others, scores):
    """Print the table: a row for every baseline, {name: scores}, and the model's."""
    c = task.config
    for name, row in [*others.items(), ("cmrcnet", scores)]:
        run.say(hest.table_row(name, row, COLUMNS))
    text = (
        f"gain over image-only retrieval {scores['gain_over_image_only']:+.3f}, ridge "
        f"{scores['gain_over_ridge_raw']:+.3f} (raw); slides told apart from z "
        f"{scores['slide_accuracy_image']:.2f}, from h {scores['slide_accuracy_gene']:.2f} (chance "
        f"{1 / len(task.train_samples):.2f}); contrastive loss {scores['contrastive']:.2f}, "
        f"guessing {scores['contrastive_guess']:.2f}"
    )
    if c.index == "ivf":
        text += f"; recall@{c.k} of the inverted file {scores['recall_at_k']:.3f}"
    run.say(text)


KS = (10, 20, 50, 100, 200, 300, 500)  # neighbours of `pcc_by_k`


def pcc_by_k(task, prediction):
    """{k: pcc_mean} of averaging so many neighbours of one model's `Prediction`, as far as there
    are keys."""
    spots = task.whole.spots
    ks = [k for k in KS if k <= len(spots)]
    queries = torch.cat(prediction.queries)
    cosine, rows = retrieval.exact_topk(queries, prediction.keys, max(ks, default=1))
    sizes = np.cumsum([len(z) for z in prediction.queries])[:-1]
    curve = {}
    for k in ks:
        values = retrieval.read_out(cosine[:, :k], rows[:, :k], spots.values)
        scores = hest.score(task.test, np.split(values, sizes), None, task.n_targets)
        curve[k] = scores["pcc_mean"]
    return curve


def gains(scores, others):
    """{"gain_over_<baseline>": difference of pcc_mean}."""
    return {f"gain_over_{name}": scores["pcc_mean"] - others[name]["pcc_mean"] for name in others}


def arrays_of(samples, genes, prediction):
    """What arrays.npz holds: spots of all slides one below the other; neighbours are rows of the
    atlas."""
    return hest.spot_arrays(samples, prediction.expression, genes) | {
        "embedding": torch.cat(prediction.queries).cpu().numpy(),
        "neighbours": torch.cat([rows[:, :10] for rows in prediction.rows]).cpu().numpy(),
    }


def outputs(task, prediction, model):
    """(arrays of the record, {file name: function that writes it}): checkpoint, atlas, exports."""
    spots, inputs = task.whole.spots, task.whole.inputs
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    mark = retrieval.fingerprint(weights, inputs.genes)
    saved = {
        "config": vars(task.config).copy(),
        "genes": task.genes,
        "inputs": inputs.genes,
        "scaler": inputs.scaler,
        "weights": weights,
        "fingerprint": mark,
    }
    genes, values = atlas_values(task)
    names = {"genes": genes, "inputs": inputs.genes, "slides": spots.names, "slide": spots.slide}
    attributes = {"encoder": encoder_name(task.config), "fingerprint": mark}
    attributes["target"] = task.config.target
    keys = prediction.keys.cpu().numpy()
    arrays = arrays_of(task.test, task.genes, prediction)
    arrays |= {"key_slide": np.array(spots.names)[spots.slide], "key_row": spots.row}
    files = {
        "model.pt": lambda f: torch.save(saved, f),
        "atlas.h5": lambda f: retrieval.write_atlas(f, keys, values, names, attributes),
    }
    slides = [s.slide for s in task.test]
    return arrays, files | export.files_of("cmrcnet", arrays, slides, task.config)


def atlas_values(task):
    """Genes, and CSR (M, genes) of their expression, of the atlas: target genes that not every
    training slide measures, then all that every one does."""
    shared = hest.shared_genes([s.slide for s in task.train_samples])
    lacking = [j for j, g in enumerate(task.genes) if g not in set(shared)]
    target = task.config.target
    parts = [hest.log_expression(s.slide, shared, target)[s.scored] for s in task.train_samples]
    first = sp.csr_matrix(task.whole.spots.y[:, lacking])
    values = sp.hstack([first, sp.vstack(parts)]).tocsr()
    return [*(task.genes[j] for j in lacking), *shared], values


def facts(task, histories, model):
    """What stands in the record beside the scores."""
    c, samples = task.config, [*task.train_samples, *task.test]
    is_task, is_oracle = c.genes == "task", c.oracle_genes
    chosen = "the folder's list, chosen by its makers on all slides"
    return {
        "epochs": len(histories[-1]),
        "history": histories[-1],
        "parameters": parameter_table(model),
        "smaller_than_released": smaller_parts(c, model),
        "low_count_spots": {s.name: int((~s.scored).sum()) for s in samples},
        "genes": chosen if is_task else "training slides",
        "gene_lists": "oracle" if is_oracle else "training slides",
        "n_markers": len(task.lists[task.test[0].name]["marker"]),
        "target": c.target,
        "leaks_patient": task.sides.leaks_patient,
        "train_slides": task.sides.train,
        "test_slides": task.sides.test,
    }


# of the released model
RELEASED = {"dim": 256, "snn": 2048, "n_hvg": 1000, "epochs": 60}


def smaller_parts(config, model):
    """{part: how it is smaller than in the released model, in words}."""
    parts = {}
    if model.vit is None:
        parts["backbone"] = "frozen features of one token in the place of a ViT of 50"
    elif config.backbone == "tiny":
        vit, (n_tokens, width) = model.vit, model.vit.pos.shape[1:]
        parts["backbone"] = (
            f"a ViT of {len(vit.blocks)} layers, {width} wide, {n_tokens} tokens; released: 8 "
            "layers, 768 wide, 50 tokens"
        )
    for name, value in RELEASED.items():
        if getattr(config, name) < value:
            parts[name] = f"{getattr(config, name)}; released: {value}"
    return parts


def n_parameters(module):
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


def parameter_table(model):
    """{block: number of parameters} of a model."""
    parts = {"vit": model.vit, "image_head": model.image_head, "gene_head": model.gene_head}
    if model.reconstruction is not None:
        part = model.reconstruction
        parts |= {
            "gene_tokens": part.genes,
            "image_tokens": part.image,
            "cross_attention": part.cross,
            "residual_blocks": part.fusion,
        }
    return {name: n_parameters(part) for name, part in parts.items() if part is not None}


def draw(record, task, predicted, histories, curve):
    """genes.png, gene_gene.png, training.png and pcc_by_k.png of a run; curve {k: PCC}."""
    sample = task.test[0]
    draw_genes(record, sample, predicted[0], task.genes, task.n_targets)
    heg = set(task.lists[sample.name]["heg"])
    columns = [j for j, g in enumerate(task.genes) if g in heg and sample.measured[j]]
    pair = [values[sample.scored][:, columns] for values in (sample.y, predicted[0])]
    record.figure("gene_gene", figures.gene_gene_maps(*pair))
    names = ("loss", "contrastive, mean l", "reconstruction error")
    losses = dict(zip(names, zip(*histories[-1])))
    curves = {f"fold {i}": [row[-1] for row in h] for i, h in enumerate(histories[:-1])}
    title, guess = "PCC on held-out training spots", np.log(task.config.batch)
    record.figure("training", figures.training_curves(losses, curves, title, guess))
    record.figure("pcc_by_k", figures.pcc_by_k(curve, task.config.k))
    figures.close()


def draw_genes(record, sample, predicted, genes, n_targets):
    """Maps of a slide: five best and five worst genes, truth above prediction; without truth the
    most varied."""
    record.figure("genes", figures.gene_maps(sample, predicted, genes, n_targets))
