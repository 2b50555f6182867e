"""Expression of new slides from a saved model and its atlas: nothing is trained."""

from pathlib import Path

import data
from evaluation import hest, retrieval_record, retrieval_task
from plainst import export, retrieval, run
from plainst.features import input_files

NEEDED = ["config", "genes", "inputs", "scaler", "weights", "fingerprint"]
# flags that --predict takes from its own command line, beside the place of things
OF_THIS_RUN = ("k", "weighting", "index", "recall", "h5ad")


def read_model(config, check):
    """(what `retrieval_record.outputs` saved, the flags to predict with). Raises DataError for a
    file that is no checkpoint of this program."""
    saved = run.read_checkpoint(config.predict, "whole cmrcnet checkpoint", ["config"])
    known = run.saved_flags(config.predict, type(config), saved["config"], check)
    with run.checkpoint_fits(config.predict):
        saved = {name: saved[name] for name in NEEDED}
        if not all(isinstance(name, str) for name in saved["genes"]):
            raise ValueError("its genes are no names")
    for name in OF_THIS_RUN:
        setattr(known, name, getattr(config, name))
    known.fast = True
    return saved, known


def read_keys(config, known, saved, encoder):
    """keys (M, d), values (M, G) of the genes to read out, and their names, of the atlas beside
    the checkpoint.

    encoder: that of the training run. Features files do not say who made them: their width is
    compared elsewhere. Raises DataError where the encoder of the new slides is another one.
    """
    path = Path(config.predict).with_name("atlas.h5")
    name, inputs, mark = retrieval_task.encoder_name(known), saved["inputs"], saved["fingerprint"]
    if name == "file":
        name = encoder
    keys, values, available, slide = retrieval.read_atlas(path, name, inputs, mark)
    retrieval_task.require_spots(len(keys), known.k, "the atlas")
    genes = hest.genes_to_read(config.genes, saved["genes"], available)
    column = {g: j for j, g in enumerate(available)}
    values = values.tocsc()[:, [column[g] for g in genes]].tocsr()
    if known.values == "slide":
        values = retrieval_task.scaled_by_slide(values.toarray(), slide)
    return keys, values, genes


def predict_folder(config, check, vits, build, predict, start):
    """Read expression for slides without counts out of the atlas; one folder of results for all of
    them. check, vits, build, predict: those of the method; start as in `run.Run`."""
    saved, known = read_model(config, check)
    name = f"predict-{retrieval_task.variant(known)}-{data.file_checksum(config.predict)[:8]}"
    record = run.Run("cmrcnet", config, config.slice or "all", name, start)
    encoder = retrieval_task.encoder_name(known)
    slides = hest.new_slides(config, known, pixels=known.backbone != "features")
    keys, values, genes = read_keys(config, known, saved, encoder)
    path = Path(config.predict).with_name("atlas.h5")
    record.note_inputs(input_files(slides, known.encoder, [config.predict, path]))
    samples = retrieval_task.samples_of(known, slides, vits)
    with run.checkpoint_fits(config.predict):
        inputs = retrieval_task.Inputs(saved["inputs"], saved["scaler"])
        dim_in = len(saved["scaler"]["frozen_mean"])
    for s in samples:
        hest.check_width(s.features, dim_in, s.name, known.encoder, config.predict)
    with run.checkpoint_fits(config.predict):
        images = [inputs.image(s, known) for s in samples]
        model = build(known, images[0].shape[1], len(inputs.genes))
        lacking = sorted(model.state_dict().keys() - saved["weights"].keys())
        if lacking:
            raise ValueError(f"it has no {lacking[0]}")
        model.load_state_dict(saved["weights"])
    model.to(record.device)
    queries = [retrieval_task.embed(model.embed_image, x, known, record.device) for x in images]
    prediction = predict(queries, keys.to(record.device), values, known)
    retrieval_record.draw_genes(record, samples[0], prediction.expression[0], genes, len(genes))
    arrays = retrieval_record.arrays_of(samples, genes, prediction)
    record.finish(
        {"recall_at_k": prediction.recall},
        {},
        arrays,
        retrieval_record.n_parameters(model),
        files=export.files_of("cmrcnet", arrays, slides, known),
        checkpoint=config.predict,
    )
    return 0
