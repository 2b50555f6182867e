"""Genes of new slides from a saved pathway network: folders of patches or of features."""

import data
from evaluation import genes, hest
from evaluation.samples import Scaler, to_sample
from plainst import export, run
from plainst.features import input_files

# of a checkpoint
NEEDED = ("scaler", "genes", "gene_sets", "weights")


def read_checkpoint(config, check):
    """What `Result.checkpoint` saved, with its scaler as a `Scaler`, and the flags of its run."""
    path = config.predict
    saved = run.read_checkpoint(path, "stformer checkpoint", ["config"])
    known = run.saved_flags(path, type(config), saved["config"], check)
    with run.checkpoint_fits(path):
        saved = {name: saved[name] for name in NEEDED}
        scaler, n_genes = saved["scaler"], len(saved["genes"])
        if {scaler[name].shape for name in ("y_mean", "y_std", "rate")} != {(n_genes,)}:
            raise ValueError("its scaler is of other genes")
        if known.loss == "zinb" and "median_library" not in scaler:
            raise ValueError("it lacks the median library")
        if not saved["weights"] or not isinstance(saved["weights"], list):
            raise ValueError("it holds no network")
        for name in ("genes", "gene_sets"):
            if not all(isinstance(word, str) for word in saved[name]):
                raise ValueError(f"its {name} are no names")
        if scaler["x_mean"].ndim != 1:
            raise ValueError("its scaler is of no features")
        saved["scaler"] = Scaler(scaler)
    return saved, known


def load_models(config, saved, known, build, dim_in, device):
    """The networks of a checkpoint."""
    with run.checkpoint_fits(config.predict):
        n_genes, n_pathways = len(saved["genes"]), len(saved["gene_sets"]) or known.pathways
        models = [build(known, dim_in, n_genes, n_pathways) for _ in saved["weights"]]
        for model, weights in zip(models, saved["weights"]):
            model.load_state_dict(weights)
            model.to(device)
    return models


def predict_folder(config, check, build, start):
    """Predict the genes of slides that have no counts with a saved model; one folder of results for
    all of them. check, build: those of the method; start as in `run.Run`."""
    saved, known = read_checkpoint(config, check)
    slides = hest.new_slides(config, known)
    name = f"predict-{genes.variant(known)}-{data.file_checksum(config.predict)[:8]}"
    record = run.Run("stformer", config, config.slice or "all", name, start)
    record.note_inputs(input_files(slides, known.encoder, [config.predict]))
    samples, scaler = [to_sample(known, s) for s in slides], saved["scaler"]
    for s in samples:
        width = len(scaler.tensors["x_mean"])
        hest.check_width(s.x, width, s.name, known.encoder, config.predict)
    with run.checkpoint_fits(config.predict):
        samples = [scaler.features(s, known.scale) for s in samples]
    dim_in = samples[0].x.shape[1]
    models = load_models(config, saved, known, build, dim_in, record.device)
    predictions, pathways = genes.predict_genes(models, samples, scaler, known)
    names, sets = saved["genes"], saved["gene_sets"]
    shown = (samples, predictions, pathways, names, sets)
    genes.draw(record, *shown)
    arrays, known.h5ad = genes.arrays_of(*shown), config.h5ad
    n_params = sum(weight.numel() for weight in models[0].parameters())
    files = export.files_of("stformer", arrays, slides, known)
    record.finish({}, {}, arrays, n_params, files=files, checkpoint=config.predict)
    return 0
