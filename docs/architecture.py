"""One figure a method, docs/figures/<method>.svg: python -m docs.architecture draws all anew.

A box is a class or function of the method's file and links to it, a label tells the shape of what
an arrow carries. A telephone shows the figure in its full size."""

import html
import re
from dataclasses import dataclass
from pathlib import Path

FIGURES = Path(__file__).resolve().parent / "figures"
WIDTH, ROW = 400, 78
COLUMNS, HALF_WIDTH, HALF_HEIGHT = {"left": 92, "middle": 200, "right": 290}, 84, 22
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" class="architecture" role="img"
viewBox="0 0 400 HEIGHT" width="400" height="HEIGHT"><title>TITLE</title><style>
.architecture text { font: 13px system-ui, sans-serif; fill: #23262b; text-anchor: middle }
.architecture .small { font-size: 11.5px; fill: #4b5563 }
.architecture .bold { font-weight: 600 } .architecture a .bold { fill: #1c5a8d }
.architecture .box { fill: #eef3f8; stroke: #8fb0cc }
.architecture .line { fill: none; stroke: #6b7280 }</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7"
orient="auto"><path fill="#6b7280" d="M0,0 L8,4 L0,8 z"/></marker></defs>
<rect width="100%" height="100%" fill="#fdfdfb"/>"""
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


@dataclass
class Box:
    """A class or function at a column and a row; `note` is its second line. Data have no frame."""

    name: str
    column: str
    row: float
    note: str = ""
    is_data: bool = False

    def middle(self):
        return COLUMNS[self.column], round(30 + ROW * self.row)

    def point(self, side, shift):
        """(x, y) of the middle of a side, moved along the side by `shift`."""
        (x, y), (dx, dy) = self.middle(), SIDES[side]
        half_width = 4 + 3.6 * len(self.name) if self.is_data else HALF_WIDTH
        half_height = 12 if self.is_data else HALF_HEIGHT
        return x + dx * half_width + abs(dy) * shift, y + dy * half_height + abs(dx) * shift

    def svg(self, method):
        x, y = self.middle()
        name, note = html.escape(self.name), html.escape(self.note)
        if self.is_data:
            return f'<text x="{x}" y="{y + 4}">{name}</text>'
        corner = f'x="{x - HALF_WIDTH}" y="{y - HALF_HEIGHT}"'
        box = f'<rect class="box" {corner} width="168" height="44" rx="4"/>'
        box += f'<text class="bold" x="{x}" y="{y - 2 if note else y + 4}">{name}</text>'
        box += f'<text class="small" x="{x}" y="{y + 14}">{note}</text>' if note else ""
        # what torch defines has no place in the file
        is_own = not name.startswith("nn.")
        return f'<a href="../../{method}.py#{name}">{box}</a>' if is_own else box


def arrow(boxes, start, end, label="", label_at=(0, 0)):
    """From side to side, "mlp.bottom" to "Gated.left+8", with at most two corners; label_at is the
    middle of the label's first line."""
    ends = [re.fullmatch(r"(.+)\.([a-z]+)([+-]\d+)?", text).groups() for text in (start, end)]
    (x, y), (to_x, to_y) = (boxes[name].point(side, int(n or 0)) for name, side, n in ends)
    corners = [(x, to_y)] if x != to_x and y != to_y else []
    if corners and ends[0][1] == "right":
        corners = [(WIDTH - 8, y), (WIDTH - 8, to_y)]
    path = "M" + " L".join(f"{a:g},{b:g}" for a, b in [(x, y), *corners, (to_x, to_y)])
    text = f'<path class="line" d="{path}" marker-end="url(#head)"/>'
    for number, line in enumerate(label.split("\n") if label else []):
        at = f'x="{label_at[0]}" y="{label_at[1] + 14 * number}"'
        text += f'<text class="small" {at}>{html.escape(line)}</text>'
    return text


def figure(method, title, boxes, arrows):
    """Text of the SVG: boxes [Box], arrows [what `arrow` takes behind the boxes]."""
    height = round(60 + ROW * max(box.row for box in boxes))
    head = HEAD.replace("TITLE", html.escape(title)).replace("HEIGHT", str(height))
    named = {box.name: box for box in boxes}
    parts = [*(arrow(named, *ends) for ends in arrows), *(box.svg(method) for box in boxes)]
    return "\n".join([head, *parts, "</svg>\n"])


def gat_fusion():
    boxes = [
        Box("X (N, 3000)", "left", 0, is_data=True),
        Box("neighbours (N, k)", "right", 0, is_data=True),
        Box("mlp", "left", 1),
        Box("GraphEncoder", "right", 1, "GraphAttention x 2"),
        Box("CrossAttentionLayer", "left", 2.4, "x 2"),
        Box("nn.Linear", "left", 3.4, "head"),
        Box("logits (N, C)", "left", 4.2, is_data=True),
    ]
    keys = "S (N, 128)\nkey, value"
    arrows = [
        ("X (N, 3000).bottom", "mlp.top"),
        ("neighbours (N, k).bottom", "GraphEncoder.top"),
        ("neighbours (N, k).right", "CrossAttentionLayer.right+14"),
        ("mlp.right", "GraphEncoder.left", "E", (191, 103)),
        ("mlp.bottom", "CrossAttentionLayer.top", "E (N, 128)\nquery", (132, 160)),
        ("GraphEncoder.bottom", "CrossAttentionLayer.right-8", keys, (333, 160)),
        ("CrossAttentionLayer.bottom", "nn.Linear.top", "Z (N, 128)", (132, 261)),
        ("nn.Linear.bottom", "logits (N, C).top"),
    ]
    return "Expression and graph embeddings meet in cross-attention", boxes, arrows


# method: (title, boxes, arrows)
DESCRIPTIONS = {"gat_fusion": gat_fusion()}


def main():
    for method, description in DESCRIPTIONS.items():
        (FIGURES / f"{method}.svg").write_text(figure(method, *description), "utf-8")


if __name__ == "__main__":
    main()
