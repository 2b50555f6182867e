"""Where the public data sets live and under which terms.

Files of git repositories are pinned to a commit, so their content cannot change; the other homes
offer no versions, and the sum of the first download is recorded (see `download`).
"""

from collections import namedtuple

# address, name under --out, and bytes and hex digest where known beforehand
Item = namedtuple("Item", "url name size sha256", defaults=(None, None))

GITHUB, S3 = "https://raw.githubusercontent.com", "https://spatial-dlpfc.s3.us-east-2.amazonaws.com"
PILOT = f"{GITHUB}/LieberInstitute/HumanPilot/999faa39ed534993da1c9e491085adc6f60940bc/10X"
PCISEQ = f"{GITHUB}/acycliq/pciSeq/59f5379268bcba54b49f9d7e00eea73970f981a3/pciSeq"
NATMI = f"{GITHUB}/asrhou/NATMI/f35f677cb2e4c8a176a6c5501a9483c9e28661a1"
MSIGDB = "https://data.broadinstitute.org/gsea-msigdb/msigdb/release/2024.1.Hs"
SDMBENCH = "http://sdmbench.drai.cn/tcm/download/?file_path=/mnt/JINGD/data/file/sdmbench/db"

FIGSHARE = {
    "151507": 39055556,
    "151508": 39055589,
    "151509": 39055586,
    "151510": 39055583,
    "151669": 39055580,
    "151670": 39055577,
    "151671": 39055574,
    "151672": 39055571,
    "151673": 39055568,
    "151674": 39055565,
    "151675": 39055562,
    "151676": 39055559,
}
# Maynard et al. 2021, Nature Neuroscience 24, 425: three donors, four sections each
DONORS = {
    "Br5292": ("151507", "151508", "151509", "151510"),
    "Br5595": ("151669", "151670", "151671", "151672"),
    "Br8100": ("151673", "151674", "151675", "151676"),
}
PLAIN = {
    "ca1": [
        Item(f"{PCISEQ}/data/mouse/ca1/iss/spots.csv", "spots.csv"),
        Item(f"{PCISEQ}/data/mouse/ca1/segmentation/label_image.coo.npz", "label_image.coo.npz"),
    ],
    "hallmark": [Item(f"{MSIGDB}/h.all.v2024.1.Hs.symbols.gmt", "h.all.symbols.gmt")],
    "starmap": [Item(f"{SDMBENCH}/STARmap_20180505_BY3_1k.h5ad", "BY3.h5ad")],
    "osmfish": [
        Item(
            "http://linnarssonlab.org/osmFISH/osmFISH_SScortex_mouse_all_cells.loom",
            "cortex.loom",
        )
    ],
    "connectomedb": [
        Item(
            f"{NATMI}/lrdbs/lrc2p.csv",
            "connectomedb2020.csv",
            26348,
            "38dca29a53d1f793d474534314177c2886c7c3d61d74e7f0d64eb192d0e1b401",
        )
    ],
}
# what --help lists and the last line of a download repeats: contents, terms
TERMS = {
    "dlpfc": (
        "12 human cortex Visium slices of 3 donors (Maynard et al. 2021)",
        "Artistic License 2.0, as its repository LieberInstitute/HumanPilot",
    ),
    "ca1": ("mouse CA1 in-situ sequencing, the demo of pciSeq (Qian et al. 2020)", "MIT"),
    "hallmark": ("50 MSigDB Hallmark gene sets (Liberzon et al. 2015)", "CC BY 4.0"),
    "starmap": (
        "STARmap mouse visual cortex, 1,207 cells (Wang et al. 2018), as in SDMBench",
        "none stated: ask the authors before you pass it on",
    ),
    "osmfish": (
        "osmFISH mouse somatosensory cortex, 33 genes (Codeluppi et al. 2018), a loom file",
        "none stated: ask the authors before you pass it on",
    ),
    "connectomedb": (
        "connectomeDB2020, 2,293 ligand-receptor pairs (Hou et al. 2020)",
        "MIT, as its repository asrhou/NATMI",
    ),
    "hest": (
        "HEST-Benchmark tasks (needs huggingface_hub, accepted terms and a token)",
        "CC BY-NC-SA 4.0",
    ),
    "hest1k": ("HEST-1k samples (the same)", "CC BY-NC-SA 4.0"),
}
ELSEWHERE = """Of other public sets the origin; they need a conversion or terms of their own:
  STARmap prefrontal cortex   https://www.starmapresources.com/data
  HER2+ breast tumours        https://github.com/almaan/her2st, doi:10.5281/zenodo.4751624
  pancreatic cancer PDAC-A    GEO GSE111672
  CellPhoneDB v5              https://github.com/ventolab/cellphonedb-data
  Reactome pathways (GMT)     https://reactome.org/download-data"""


def dlpfc_homes(sample):
    """The two public homes of a DLPFC slice: Space Ranger parts (count matrix last, so that where
    it is the rest is too), and one h5ad."""
    spatial = f"{sample}/spatial"
    parts = [
        Item(f"{PILOT}/barcode_level_layer_map.tsv", "barcode_level_layer_map.tsv"),
        Item(f"{PILOT}/{sample}/tissue_positions_list.txt", f"{spatial}/tissue_positions_list.csv"),
        Item(f"{PILOT}/{sample}/scalefactors_json.json", f"{spatial}/scalefactors_json.json"),
    ]
    images = ("tissue_lowres_image.png", "tissue_hires_image.png")
    parts += [Item(f"{S3}/images/{sample}_{image}", f"{spatial}/{image}") for image in images]
    matrix = "filtered_feature_bc_matrix.h5"
    parts.append(Item(f"{S3}/h5/{sample}_{matrix}", f"{sample}/{matrix}"))
    figshare = f"https://ndownloader.figshare.com/files/{FIGSHARE[sample]}"
    return parts, [Item(figshare, f"{sample}.h5ad")]
