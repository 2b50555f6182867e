"""Weights of a ViT checkpoint, by the names of timm or transformers, for the ViT of a method."""

import re

import torch

from plainst.readers.checked import DataError

# what a name holds -> what stands for it in a method's ViT
RENAME = [
    (r"^(vit|model|module|backbone|visual)\.", ""),
    (r"^encoder\.", ""),
    (r"^embeddings\.", ""),
    (r"^(layers?|blocks)\.", "blocks."),
    (r"^(patch_embeddings\.projection|patch_embed\.proj)\.", "patch."),
    (r"^cls_token$", "cls"),
    (r"^(position_embeddings|pos_embed)$", "pos"),
    (r"^layernorm\.", "norm."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.output\.dense|attention\.o_proj|attn\.proj", "proj"),
    (r"attention\.attention\.|attention\.(?=[qkv]_proj)", ""),
    (r"attn\.qkv", "qkv"),
    (r"\b(q_proj|query)\b", "q"),
    (r"\b(k_proj|key)\b", "k"),
    (r"\b(v_proj|value)\b", "v"),
    (r"intermediate\.dense|mlp\.fc1", "fc1"),
    (r"(?<!\w)output\.dense|mlp\.fc2", "fc2"),
]


def vit_state(tensors, model):
    """Checkpoint {name: tensor} by timm or transformers names -> state_dict of `model`, a ViT with
    `blocks`, `patch`, `cls`, `pos` and `norm`. Raises DataError with the first tensor that does not
    fit."""
    state = {}
    for name, value in tensors.items():
        for pattern, new in RENAME:
            name = re.sub(pattern, new, name)
        state[name] = value.float()
    join_qkv(state)
    own = model.state_dict()
    n_layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape]
    if wrong or n_layers != len(model.blocks):
        tensor = f"{wrong[0]} is lacking or of another shape" if wrong else "every tensor fits"
        raise DataError(
            f"the checkpoint has {n_layers} layers and {tensor}, the ViT has {len(model.blocks)} "
            "layers: give a ViT-B/32 checkpoint for 224 pixels and --backbone base"
        )
    return {name: state[name] for name in own}


def join_qkv(state):
    """Put the maps of query, key and value together, as timm has them, where they stand apart."""
    for name in [n for n in state if n.endswith(("q.weight", "q.bias"))]:
        stem, kind = name.removesuffix("weight").removesuffix("bias")[:-2], name.rsplit(".", 1)[1]
        parts = [state.get(f"{stem}{letter}.{kind}") for letter in "qkv"]
        if all(part is not None for part in parts):
            state[f"{stem}qkv.{kind}"] = torch.cat(parts)
