"""Image features of spots: crops, a hand-made descriptor, frozen encoders, files; their cache."""

import hashlib
import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np

from plainst.readers.checked import (
    NPZ_ERRORS,
    DataError,
    file_checksum,
    read_json,
)


def read_embedding(path, slide):
    """(N, D) float32 frozen vectors of a slide's spots: .npz with `embedding` and `barcodes`
    (joined by barcode), or .npy in row order.

    `{slice}` or `{sample}` in the path stands for the slide's sample name. Raises DataError for a
    file that is damaged or does not fit the slide.
    """
    path = slice_path(path, slide)
    values, row = read_vectors(path)
    if row is None:
        if len(values) != slide.n_spots:
            raise DataError(
                f"{path} has {len(values)} rows, slide {slide.sample} {slide.n_spots} spots: "
                "save an .npz with `barcodes` to join by name"
            )
        return values
    missing = [b for b in slide.barcodes if b not in row]
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} of the {slide.n_spots} barcodes of slide "
            f"{slide.sample} ({missing[0]} ...): embed all spots"
        )
    return values[[row[b] for b in slide.barcodes]]


def spots_with_vector(path, slide):
    """(N,) bool: the spots of a slide that have a vector in the file of `read_embedding`; all of
    them where it names no barcode. Raises DataError where none has one."""
    path = slice_path(path, slide)
    row = read_vectors(path)[1]
    if row is None:
        return np.ones(slide.n_spots, bool)
    has_vector = np.array([b in row for b in slide.barcodes])
    if not has_vector.any():
        raise DataError(
            f"{path} has no barcode of slide {slide.sample} ({slide.barcodes[0]} ...): give the "
            "vectors of this slide"
        )
    return has_vector


def read_vectors(path):
    """(M, D) float32 and {barcode: row}, None in a .npy. Raises DataError for a damaged file."""
    names = None
    try:
        with open(path, "rb") as file:
            values = np.load(file, allow_pickle=False)
            # an .npz by content, whatever its name
            if not isinstance(values, np.ndarray):
                values, names = values["embedding"], values["barcodes"].astype(str)
            if values.dtype.kind not in "iuf":
                raise ValueError(f"it is {values.dtype}")
            # beyond float32 is infinite, and refused below
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
            is_finite = bool(np.isfinite(values).all())
    except NPZ_ERRORS as error:
        raise DataError(
            f"{path} holds no embedding ({error}): give .npy (N, D), or .npz with `embedding` "
            "(N, D) and `barcodes` (N,)"
        ) from error
    if values.ndim != 2 or not is_finite:
        raise DataError(
            f"{path} has shape {values.shape} or NaN values: an embedding is a finite (N, D) array"
        )
    if names is None:
        return values, None
    if names.shape != (len(values),):
        raise DataError(
            f"{path} has {len(values)} vectors but barcodes of shape {names.shape}: save one "
            "barcode per row"
        )
    row = {b: i for i, b in enumerate(names)}
    if len(row) < len(names):
        twice = next(b for i, b in enumerate(names) if row[b] != i)
        raise DataError(
            f"{path} has {len(names) - len(row)} duplicate barcodes ({twice} ...): save one "
            "row per barcode"
        )
    return values, row


def slice_path(path, slide):
    """Path with `{slice}` or `{sample}` replaced by the slide's sample name."""
    return Path(str(path).replace("{slice}", slide.sample).replace("{sample}", slide.sample))


def is_features_file(encoder):
    """Whether the flag names a file of features, not a model that makes them."""
    return Path(encoder).suffix in (".npy", ".npz")


def input_files(slides, encoder="", more=()):
    """Paths of all files whose content can change a number of a run, each once, as strings.

    Of each slide its counts, positions, labels and patches (which decide what spots there are);
    with `encoder` (empty where the run looks at no picture) the file of features that it names, or
    else the image of a slide without patches; then `more`, of which `{slice}` or `{sample}` stands
    for one file a slide, and an empty name for none.
    """
    files = []
    for slide in slides:
        files += [slide.source, *slide.tables]
        if slide.patches is not None:
            files.append(slide.patches.path)
        if is_features_file(encoder):
            files.append(slice_path(encoder, slide))
        elif encoder and slide.patches is None:
            files.append(slide.image_file)
        files += [slice_path(path, slide) for path in more if path]
    return list(dict.fromkeys(str(path) for path in files if path))


def crops(slide, rows, side_um):
    """(n, s, s, 3) uint8 crops of constant physical side centred on the spots `rows`; beyond the
    border the edge pixels repeat.

    Raises DataError without an image or without a physical scale.
    """
    if slide.image is None or slide.image_scale is None:
        raise DataError(
            f"slide {slide.sample} has no image: put tissue_hires_image.png and "
            "scalefactors_json.json into spatial/, or choose another mode"
        )
    if not slide.um_per_px:
        raise DataError(
            f"slide {slide.sample} has no physical scale (no lattice, no microns_per_pixel): "
            "give image features as a file with --encoder"
        )
    half = max(1, round(side_um / slide.um_per_px * slide.image_scale / 2))
    centre = np.rint(slide.xy[rows] * slide.image_scale).astype(int)  # (n, 2)
    height, width = slide.image.shape[:2]
    step = np.arange(-half, half + 1)
    # (n, s) each
    x, y = (
        np.clip(centre[:, i, None] + step, 0, size - 1) for i, size in ((0, width), (1, height))
    )
    return slide.image[y[:, :, None], x[:, None, :]]  # (n, s, s, 3)


# optical-density directions (Ruifrok & Johnston 2001, Table 1)
HAEMATOXYLIN_EOSIN = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])


def handmade_descriptor(patches):
    """(n, h, w, 3) uint8 -> (n, 42) float32 colour and texture statistics: RGB, haematoxylin and
    eosin density, gradients at two scales."""
    rgb = patches.astype(np.float32) / 255
    density = -np.log(np.maximum(rgb, 1 / 255))  # (n, h, w, 3)
    stains = density @ np.linalg.pinv(HAEMATOXYLIN_EOSIN).astype(np.float32)  # (n, h, w, 2)
    channels = np.concatenate([rgb, stains], -1)  # (n, h, w, 5)
    flat = channels.reshape(len(channels), -1, 5)
    parts = [flat.mean(1), flat.std(1), *np.quantile(flat, (0.1, 0.5, 0.9), axis=1)]  # 5 x (n, 5)
    for step in (1, 2):
        for axis in (1, 2):
            if channels.shape[axis] > step:
                a = np.abs(
                    np.take(channels, range(step, channels.shape[axis]), axis)
                    - np.take(channels, range(channels.shape[axis] - step), axis)
                )
                # blue, haematoxylin, eosin: (n, 3)
                parts.append(a[..., 2:].reshape(len(a), -1, 3).mean(1))
    centre = channels[
        :,
        channels.shape[1] // 4 : -(channels.shape[1] // 4) or None,
        channels.shape[2] // 4 : -(channels.shape[2] // 4) or None,
    ]
    # what the spot has that its surroundings do not: (n, 5)
    parts.append(centre.mean((1, 2)) - flat.mean(1))
    return np.concatenate([p.reshape(len(rgb), -1) for p in parts], 1).astype(np.float32)


# what one vector of a picture is, by the model_type of a Hugging Face encoder: the class token
# after the last norm, the mean of all tokens, or the model's own pooled output (the projected image
# features where it has a text side)
POOLING = {
    "vit": "cls",
    "deit": "cls",
    "vit_msn": "cls",
    "dinov2": "cls",
    "dinov2_with_registers": "cls",
    "dinov3_vit": "cls",
    "ijepa": "mean",
    "clip": "pooler",
    "clip_vision_model": "pooler",
    "siglip": "pooler",
    "siglip_vision_model": "pooler",
    "beit": "pooler",
    "data2vec-vision": "pooler",
    "swin": "pooler",
    "swinv2": "pooler",
    "hiera": "pooler",
    "resnet": "pooler",
    "regnet": "pooler",
    "convnext": "pooler",
    "convnextv2": "pooler",
    "efficientnet": "pooler",
    "timm_wrapper": "pooler",
}


def load_vision_model(name):
    """The Hugging Face model `name` in eval mode, and its entry of POOLING.

    Raises DataError without transformers, for a model that cannot be loaded or has no entry, and
    where the file lacks weights that the features would pass through: transformers draws them at
    random.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise DataError(
            f"encoder {name!r} needs transformers: pip install transformers huggingface_hub "
            "safetensors, or --encoder handmade"
        ) from error
    try:
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True)
    # RuntimeError: weights of another size than the configuration's
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"encoder {name!r} cannot be loaded ({str(error).splitlines()[0]}): check the "
            "name, or the connection"
        ) from error
    kind = model.config.model_type
    if kind not in POOLING:
        raise DataError(
            f"encoder {name!r} is a {kind}, of which it is not known how its tokens make one "
            f"vector: choose one of {', '.join(POOLING)}, or give its features as an .npz file"
        )
    # of a masked patch in pre-training, never read here
    unread = ("mask_token",) if POOLING[kind] == "pooler" else ("mask_token", "pooler.")
    missing = sorted(key for key in loading["missing_keys"] if not any(u in key for u in unread))
    if missing:
        raise DataError(
            f"encoder {name!r} lacks {len(missing)} weights ({missing[0]} ...), which would be "
            "random: give a complete checkpoint, or its features as an .npz file"
        )
    return model.eval(), POOLING[kind]


def pooled(output, pooling):
    """(n, D) of a model's output, by an entry of POOLING."""
    if pooling == "pooler":
        # projected image features come as a tensor or as an output, by the version
        return output if hasattr(output, "flatten") else output.pooler_output
    tokens = output.last_hidden_state  # (n, tokens, D)
    return tokens[:, 0] if pooling == "cls" else tokens.mean(1)


def pretrained_encoder(name, device="cpu"):
    """A frozen Hugging Face vision model as a function (n, h, w, 3) uint8 -> (n, D) float32. Needs
    transformers (extra `[pretrained]`).

    name: hub name or local folder. Input is resized to the model's image size (224 where it does
    not say) and normalised by its own mean and std (ImageNet's where it has none). Output: as
    POOLING says of the model's type. Raises DataError as `load_vision_model`.
    """
    model, pooling = load_vision_model(name)
    import torch

    model = model.to(device)
    vision = getattr(model.config, "vision_config", model.config)
    size, mean, std = (
        getattr(vision, "image_size", 224) or 224,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    size = size[0] if isinstance(size, (list, tuple)) else size
    written = Path(name) / "preprocessor_config.json"
    if not Path(name).is_dir():
        from transformers.utils import cached_file

        found = cached_file(
            name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
        )
        written = Path(found) if found else written
    if written.is_file():
        told = read_json(written)
        mean, std = told.get("image_mean", mean), told.get("image_std", std)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def encode(patches):
        # (n, 3, h, w)
        x = (
            torch.as_tensor(np.ascontiguousarray(patches), device=device)
            .permute(0, 3, 1, 2)
            .float()
            / 255
        )
        x = torch.nn.functional.interpolate(
            x, size=(size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        x = (x - mean) / std  # (n, 3, size, size)
        if hasattr(model, "get_image_features"):
            out = model.get_image_features(pixel_values=x)
        else:
            out = model(pixel_values=x)
        out = pooled(out, pooling)
        return out.flatten(1).float().cpu().numpy()  # (n, D)

    return encode


def image_features(slide, encoder="handmade", crop_um=310.0, cache=None, device="cpu", batch=64):
    """(N, D) float32 frozen image features around each spot.

    encoder: `handmade`, a Hugging Face name, or a .npy / .npz file. The slide's own patches are
    used where it has them, else crops of `crop_um` from its image. Cached as an .npz under `cache`,
    keyed by image, its scale, positions, encoder and crop.
    """
    if is_features_file(encoder):
        return read_embedding(encoder, slide)
    if slide.patches is None:
        # complain before the encoder is loaded
        crops(slide, np.arange(1), crop_um)
    path = (
        None
        if cache is None
        else Path(cache) / f"{slide.sample}-{cache_key(slide, encoder, crop_um)}.npz"
    )
    if path is not None and path.is_file():
        return read_embedding(path, slide)
    encode = handmade_descriptor if encoder == "handmade" else pretrained_encoder(encoder, device)
    rows = np.array_split(np.arange(slide.n_spots), max(1, slide.n_spots // batch))
    out = np.concatenate(
        [
            encode(slide.patches[r] if slide.patches is not None else crops(slide, r, crop_um))
            for r in rows
        ]
    )
    if path is not None:
        save_features(path, out, slide.barcodes)
    return out


def cache_key(slide, encoder, crop_um):
    """16 hex digits that change with anything the features depend on: pixels, positions, crop,
    encoder (a local one by its files)."""
    files = (
        sorted(p for p in Path(encoder).rglob("*") if p.is_file()) if Path(encoder).is_dir() else []
    )
    weights = [(str(p.relative_to(encoder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(
        repr(
            (
                encoder,
                weights,
                crop_um,
                slide.image_scale,
                slide.um_per_px,
                slide.sample,
                slide.n_spots,
            )
        ).encode()
    )
    if encoder != "handmade":
        key.update(repr(POOLING).encode())
    if slide.patches is not None:
        key.update(file_checksum(slide.patches.path).encode())
        key.update(slide.patches.rows.tobytes())
    else:
        key.update(np.ascontiguousarray(slide.image).tobytes())
    key.update(np.ascontiguousarray(slide.xy).tobytes())
    return key.hexdigest()[:16]


def save_features(path, embedding, barcodes):
    """Write the cache beside its place and rename; a folder that cannot be written is no error, the
    features are only made again."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, embedding=embedding, barcodes=barcodes)
        os.replace(temporary, path)
    except OSError as error:
        # on a full disk, half of it
        with suppress(OSError):
            temporary.unlink()
        warnings.warn(
            f"image features are not cached: {path.parent} cannot be written "
            f"({error.strerror}); name a folder with --cache",
            stacklevel=3,
        )


def read_tensors(path, remedy="give a timm or transformers ViT-B/32 file"):
    """{name: tensor} of a .safetensors file (extra [pretrained]) or of a torch file of tensors.
    Raises DataError, which ends with `remedy`."""
    import torch

    from plainst import run

    if Path(path).suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise DataError(
                f"{path} needs the package safetensors: install the extra [pretrained], or give a "
                ".pt file"
            ) from error
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{path} is not a checkpoint of tensors ({reason}): {remedy}"
            ) from error
    state = run.read_checkpoint(path, "checkpoint of tensors", remedy=remedy)
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    return {k: v for k, v in state.items() if torch.is_tensor(v)}
