"""Search among keys by cosine, and the atlas: keys and values of many spots in one HDF5 file."""

import hashlib
import io

import h5py
import numpy as np
import scipy.sparse as sp
import torch
from sklearn.cluster import MiniBatchKMeans
from torch.nn import functional as F

from plainst.readers.checked import DataError, open_h5, read_array

TILE = 1 << 26  # most cosines held at once
N_SAMPLE = 512  # queries on which the recall of an inverted file is measured


def exact_topk(queries, keys, k, tile=TILE):
    """Cosine top-k: queries (Q, d), keys (M, d) -> similarity (Q, k), index (Q, k), best first. At
    most `tile` cosines are held at once."""
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    step = max(1, min(len(queries), tile // len(keys)))
    found = [(q @ keys.T).topk(k) for q in queries.split(step)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


class InvertedFile:
    """Keys (M, d) in k-means lists of which a query reads the `probe` nearest (Sivic & Zisserman
    2003): M probe / lists cosines a query, not M.

    Search goes list by list: the queries that probe a list meet its keys, which lie together, in
    one matrix product.
    """

    def __init__(self, keys, lists=0, seed=0, sample=65536):
        keys = F.normalize(keys, dim=-1)
        lists = min(lists or int(2 * len(keys) ** 0.5), len(keys))
        rows = torch.from_numpy(
            np.random.default_rng(seed).permutation(len(keys))[: max(sample, 32 * lists)]
        )
        means = MiniBatchKMeans(
            lists,
            batch_size=max(4096, 2 * lists),
            n_init=1,
            max_iter=20,
            init="random",
            random_state=seed,
        )
        centre = torch.from_numpy(means.fit(keys[rows].cpu().numpy()).cluster_centers_)
        self.centre = F.normalize(centre.to(keys), dim=-1)  # (lists, d)
        owner = exact_topk(keys, self.centre, 1)[1][:, 0]  # (M,)
        self.order = owner.argsort(stable=True)
        self.keys = keys[self.order]  # a list is a run of rows
        self.first = F.pad(torch.bincount(owner, minlength=lists).cumsum(0), (1, 0)).tolist()

    def recall_by_probe(self, queries, k):
        """(lists,) share of the k nearest keys of the queries (Q, d) that lie in the 1, 2, ...
        nearest lists: what a search that reads so many finds."""
        queries = F.normalize(queries, dim=-1)
        nearest = exact_topk(queries, self.keys, k)[1]  # (Q, k) places in the lists' order
        first = torch.tensor(self.first[1:], device=queries.device)
        owner = torch.searchsorted(first, nearest, right=True)  # (Q, k) list of each
        order = (queries @ self.centre.T).argsort(descending=True)  # (Q, lists)
        rank = order.argsort().gather(1, owner)  # (Q, k)
        counts = torch.bincount(rank.flatten(), minlength=len(self.centre))
        return (counts.cumsum(0) / rank.numel()).cpu()

    def probe_for(self, queries, k, recall=0.95, seed=0):
        """Fewest lists to read for this recall at k, and the recall, on a sample of the queries."""
        curve = self.recall_by_probe(some_rows(queries, N_SAMPLE, seed), k)
        # rounding may leave the last at .999999
        probe = min(int((curve < recall - 1e-6).sum()) + 1, len(curve))
        return probe, float(curve[probe - 1])

    def topk(self, queries, k, probe, step=32768):
        """Like `exact_topk`; a place beyond the keys of the probed lists has index -1 and
        similarity -inf."""
        queries = F.normalize(queries, dim=-1)
        found = [self._topk(q, k, min(probe, len(self.centre))) for q in queries.split(step)]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def scores(self, queries, lists):
        """For every list: the places of the (query, list) pairs in lists (Q, p) flattened, cosines
        (n, keys of the list), the list's first row."""
        pair = lists.flatten().argsort(stable=True)  # pairs by list
        ends = torch.bincount(lists.flatten(), minlength=len(self.centre)).cumsum(0).tolist()
        who = torch.div(pair, lists.shape[1], rounding_mode="floor")
        for start, stop, low, high in zip([0, *ends], ends, self.first, self.first[1:]):
            if stop > start and high > low:
                yield (
                    pair[start:stop],
                    who[start:stop],
                    queries[who[start:stop]] @ self.keys[low:high].T,
                    low,
                )

    def _topk(self, queries, k, probe, near=8):
        """The nearest lists give every query k candidates; of the other lists only what beats the
        worst of those is kept, which is little."""
        # (Q, probe), nearest list first
        probed = (queries @ self.centre.T).topk(probe).indices
        near = min(near, probe)
        best = queries.new_full((len(queries) * near, k), float("-inf"))
        row = torch.full((len(queries) * near, k), -1, dtype=torch.int32, device=queries.device)
        for pair, _, s, low in self.scores(queries, probed[:, :near]):
            top = s.topk(min(k, s.shape[1]), sorted=False)
            best[pair, : s.shape[1]], row[pair, : s.shape[1]] = (
                top.values,
                (top.indices + low).int(),
            )
        best, at = best.view(len(queries), -1).topk(k)  # (Q, k)
        row = row.view(len(queries), -1).gather(1, at).long()
        found = [
            (
                torch.arange(len(queries), device=queries.device).repeat_interleave(k),
                best.flatten(),
                row.flatten(),
            )
        ]
        for _, who, s, low in self.scores(queries, probed[:, near:]) if probe > near else ():
            i, j = torch.nonzero(s > best[who, -1:], as_tuple=True)
            found.append((who[i], s[i, j], j + low))
        who, value, row = (torch.cat(parts) for parts in zip(*found))
        order = value.argsort(descending=True, stable=True)
        order = order[who[order].argsort(stable=True)]  # by query, best first
        count = torch.bincount(who, minlength=len(queries))  # at least k each
        # (Q, k)
        at = order[(count.cumsum(0) - count)[:, None] + torch.arange(k, device=queries.device)]
        return value[at], torch.where(row[at] >= 0, self.order[row[at].clamp(min=0)], -1)


def search(queries, keys, config):
    """The `config.k` largest cosines by `config.index`: similarity, index (Q, k), and the recall of
    the inverted file on a sample of the queries (nan for the exact search)."""
    k = config.k
    if config.index == "exact":
        return *exact_topk(queries, keys, k), float("nan")
    index = InvertedFile(keys, seed=config.seed)
    probe, _ = index.probe_for(queries, k, config.recall)
    # on other queries than those that chose it
    recall = index.recall_by_probe(some_rows(queries, N_SAMPLE, config.seed + 1), k)[probe - 1]
    return *index.topk(queries, k, probe), float(recall)


def some_rows(x, n, seed):
    """At most n rows of x, drawn without replacement."""
    return x[torch.from_numpy(np.random.default_rng(seed).permutation(len(x))[:n]).to(x.device)]


def read_out(similarity, index, values, weighting="mean"):
    """Expression of the k neighbours (Q, G): plain mean, or softmax(cosine / 0.05). similarity,
    index (Q, k), -1 = none; values (M, G) any kind."""
    similarity, index = similarity.float().cpu(), index.cpu()
    weight = (
        torch.where(
            index < 0,
            float("-inf"),
            similarity / 0.05 if weighting == "softmax" else torch.zeros_like(similarity),
        )
        .softmax(1)
        .numpy()
    )
    index = index.clamp(min=0).numpy()
    pick = sp.csr_matrix(
        (weight.ravel(), index.ravel(), np.arange(0, index.size + 1, index.shape[1])),
        shape=(len(index), values.shape[0]),
    )
    out = pick @ values  # (Q, G)
    return (out.toarray() if sp.issparse(out) else out).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Atlas
# --------------------------------------------------------------------------------------------------


def fingerprint(weights, inputs):
    """sha256 of a state_dict and the genes of the gene branch: keys belong to one model."""
    digest = hashlib.sha256("\n".join(inputs).encode())
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_atlas(file, keys, values, names, attributes):
    """Write an atlas to an open binary file.

    keys (M, d); values (M, G) CSR; names {"genes": (G,) columns of values, "inputs": genes that the
    keys were made of, "slides": slides, "slide": (M,) slide of every key}; attributes {encoder,
    fingerprint, target: text}.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        f.attrs.update(attributes)
        for name, a in {
            "keys": keys,
            "data": values.data,
            "indices": values.indices,
            "indptr": values.indptr,
            "slide": names["slide"],
        }.items():
            f.create_dataset(name, data=a, compression="gzip", compression_opts=1)
        for name in ("genes", "inputs", "slides"):
            f.create_dataset(name, data=np.array(names[name], dtype="S"))
    file.write(buffer.getbuffer())


def read_atlas(path, encoder, inputs, mark):
    """keys tensor (M, d), values (M, G) CSR, genes, slide (M,) of every key.

    Raises DataError for a damaged atlas, or one of other input genes, another encoder or another
    model (`mark` is its fingerprint) than the checkpoint has.
    """
    with open_h5(path, "a whole cmrcnet atlas, the atlas.h5 that lies beside model.pt") as f:
        keys = torch.from_numpy(read_array(f["keys"], "f"))
        genes, atlas_inputs = (
            read_array(f[name], "S").astype(str).tolist() for name in ("genes", "inputs")
        )
        parts = [read_array(f["data"], "f")]
        parts += [read_array(f[name], "i") for name in ("indices", "indptr")]
        values = sp.csr_matrix(tuple(parts), shape=(len(keys), len(genes)))
        # a column out of range would be read from beyond the memory
        values.check_format()
        slide = read_array(f["slide"], "i")
        if slide.shape != (len(keys),):
            raise ValueError(f"slide has shape {slide.shape}")
        is_finite = torch.isfinite(keys).all() and np.isfinite(values.data).all()
        if keys.ndim != 2 or not is_finite or values.indptr[-1] != len(values.data):
            raise ValueError("keys or values are not finite or of another shape")
        atlas_encoder, atlas_mark = str(f.attrs["encoder"]), str(f.attrs["fingerprint"])
    for what, is_same in (
        (f"another encoder ({atlas_encoder})", atlas_encoder == encoder),
        (f"other genes ({len(atlas_inputs)})", atlas_inputs == inputs),
        ("another model", atlas_mark == mark),
    ):
        if not is_same:
            raise DataError(
                f"{path} was made with {what} than the checkpoint: give the atlas.h5 that "
                "lies beside its model.pt"
            )
    return keys, values, genes, slide
