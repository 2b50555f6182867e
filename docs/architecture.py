"""One figure a method, docs/figures/<method>.svg: python -m docs.architecture draws all anew.

A box is a class or function of the method's file and links to it, data stand without a frame, a
label tells the shape of what an arrow carries. The figure is as wide as a telephone shows it.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

FIGURES = Path(__file__).resolve().parent / "figures"
WIDTH, ROW = 400, 78
# the middle of a column; half the width and half the height of a box
COLUMNS, HALF_WIDTH, HALF_HEIGHT = {"left": 92, "right": 290, "middle": 200}, 84, 22
STYLE = (
    "text{font:13px system-ui,'Liberation Sans',sans-serif;fill:#23262b;text-anchor:middle}"
    ".small{font-size:11.5px;fill:#4b5563}.own,.name{font-weight:600}.own{fill:#1c5a8d}"
    "rect{fill:#eef3f8;stroke:#8fb0cc}path{fill:none;stroke:#6b7280}.head{fill:#6b7280}"
)
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


@dataclass
class Box:
    """A class or function at a column and a row; `note` is its second line. Data have no frame."""

    name: str
    column: str
    row: float
    note: str = ""
    is_data: bool = False

    def point(self, side, shift=0):
        """(x, y) of the middle of a side, moved along the side by `shift`."""
        dx, dy = SIDES[side]
        x, y = COLUMNS[self.column], 30 + ROW * self.row
        half = 12 if self.is_data else HALF_HEIGHT
        half_width = 4 + 3.6 * len(self.name) if self.is_data else HALF_WIDTH
        return x + dx * half_width + abs(dy) * shift, y + dy * half + abs(dx) * shift

    def svg(self, method):
        x, y = COLUMNS[self.column], 30 + ROW * self.row
        name, note = html.escape(self.name), html.escape(self.note)
        if self.is_data:
            return f'<text x="{x}" y="{y + 4}">{name}</text>'
        # what torch defines has no place in the file
        is_own = not self.name.startswith("nn.")
        kind = "own" if is_own else "name"
        text = f'<text class="{kind}" x="{x}" y="{y - 2 if note else y + 4}">{name}</text>'
        if note:
            text += f'<text class="small" x="{x}" y="{y + 14}">{note}</text>'
        corner = f'x="{x - HALF_WIDTH}" y="{y - HALF_HEIGHT}"'
        text = f'<rect {corner} width="{2 * HALF_WIDTH}" height="{2 * HALF_HEIGHT}" rx="4"/>{text}'
        return f'<a href="../../{method}.py#{self.name}">{text}</a>' if is_own else text


def arrow(boxes, start, end, label, label_at):
    """From side to side, such as "mlp.bottom" to "GraphEncoder.left+8", with at most two corners;
    label_at is the (x, y) of the middle of the label."""
    (x, y, out), (to_x, to_y, _) = (end_point(boxes, text) for text in (start, end))
    points = [(x, y), (to_x, to_y)]
    if x != to_x and y != to_y:
        # down and across, or around at the right margin
        points.insert(1, (x, to_y))
        if out == "right":
            points[1:2] = [(WIDTH - 8, y), (WIDTH - 8, to_y)]
    path = "M" + " L".join(f"{a},{b}" for a, b in points)
    text = f'<path d="{path}" marker-end="url(#head)"/>'
    for number, line in enumerate(label.split("\n")):
        y_line = label_at[1] + 14 * number
        text += f'<text class="small" x="{label_at[0]}" y="{y_line}">{html.escape(line)}</text>'
    return text


def end_point(boxes, text):
    """(x, y, side) of an end of an arrow."""
    name, side, shift = re.fullmatch(r"(.+)\.([a-z]+)([+-]\d+)?", text).groups()
    box = next(box for box in boxes if box.name == name)
    return *box.point(side, int(shift or 0)), side


def figure(method, title, boxes, arrows):
    """Text of the SVG: boxes [Box], arrows [(start, end, label, where its label stands)]."""
    height = int(60 + ROW * max(box.row for box in boxes))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<defs>"
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="head" stroke="none" d="M0,0 L8,4 L0,8 z"/></marker></defs>\n'
        '<rect width="100%" height="100%" style="fill:#fdfdfb;stroke:none"/>'
    )
    parts = [head, *(arrow(boxes, *given) for given in arrows), *(b.svg(method) for b in boxes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


# method: what `figure` draws of it
DESCRIPTIONS = {
    "gat_fusion": (
        "gat_fusion: expression and graph embeddings of spots meet in cross-attention",
        [
            Box("X (N, 3000)", "left", 0, is_data=True),
            Box("neighbours (N, k)", "right", 0, is_data=True),
            Box("mlp", "left", 1),
            Box("GraphEncoder", "right", 1, "GraphAttention x 2"),
            Box("CrossAttentionLayer", "left", 2.4, "x 2"),
            Box("nn.Linear", "left", 3.4, "head"),
            Box("logits (N, C)", "left", 4.2, is_data=True),
        ],
        [
            ("X (N, 3000).bottom", "mlp.top", "", (0, 0)),
            ("neighbours (N, k).bottom", "GraphEncoder.top", "", (0, 0)),
            ("neighbours (N, k).right", "CrossAttentionLayer.right+14", "", (0, 0)),
            ("mlp.right", "GraphEncoder.left", "E", (191, 103)),
            ("mlp.bottom", "CrossAttentionLayer.top", "E (N, 128)\nqueries", (132, 160)),
            (
                "GraphEncoder.bottom",
                "CrossAttentionLayer.right-8",
                "S (N, 128)\nkeys, values",
                (326, 160),
            ),
            ("CrossAttentionLayer.bottom", "nn.Linear.top", "Z (N, 128)", (132, 261)),
            ("nn.Linear.bottom", "logits (N, C).top", "", (0, 0)),
        ],
    )
}


def main():
    FIGURES.mkdir(exist_ok=True)
    for method, description in DESCRIPTIONS.items():
        (FIGURES / f"{method}.svg").write_text(figure(method, *description), "utf-8")


if __name__ == "__main__":
    main()
