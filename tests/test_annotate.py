"""The reading pages: every line once, formulas as MathML, links and anchors that lead somewhere,
and how wide a browser shows them."""

import ast
import html
import re
import shutil
import subprocess
import time

import pytest

from conftest import ROOT
from docs import annotate, architecture
from docs.blocks import definitions, split_blocks
from docs.mathml import formula

METHOD = '''r"""A file. Its notation:

| symbol | meaning |
|---|---|
| $N$ | spots |

    X --> Y
"""

import math

# ----------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------


# the square
@property
class Layer:
    r"""A layer.

    $$y_i = \\mathrm{ReLU}(w^\\top x_i) \\tag{1}$$

    Test: test_layer
    """

    def __init__(self):
        self.table = [
            # inside of brackets
            1,
        ]

    def forward(self, x):
        """x (N,) -> (N,), as `Layer` says."""
        # why it is squared
        # over two lines
        y = x * x  # (N,)
        # (N, 2)
        return y


TABLE = 1


def plain(x): return x
'''


@pytest.fixture
def repository(tmp_path):
    """A small repository, and a function that builds its site: (status, folder of the site)."""
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "README.md").write_text("# House\n\n[a page](docs/gat_fusion.md)\n")
    (root / "docs/gat_fusion.md").write_text(
        "# Page\n\n## A part\n\n[file](../gat_fusion.py), [layer](../gat_fusion.py#Layer), "
        "[equation](../gat_fusion.py#eq-1), [part](#a-part), `Layer.forward`, `test_layer`\n"
    )
    (root / "gat_fusion.py").write_text(METHOD)
    (root / "tests/test_gat_fusion.py").write_text("def test_layer():\n    assert True\n")

    def build():
        out = tmp_path / "site"
        return annotate.main(["--root", str(root), "--out", str(out)]), out

    return root, build


def sources():
    return [METHOD, *((ROOT / path).read_text("utf-8") for path in annotate.METHODS)]


def test_blocks_hold_every_line_once_and_in_order():
    for source in sources():
        blocks, n_lines = split_blocks(source), source.count("\n") + 1
        numbers = [n for block in blocks for n in range(block.first, block.last + 1)]
        assert numbers == list(range(1, n_lines + 1))
        for block in blocks:
            prose = [n for a, b, _ in block.notes for n in range(a, b + 1)]
            assert len(prose) == len(set(prose)) and not set(prose) & set(block.code(source))
            used = {n for n in range(block.first, block.last + 1) if source.split("\n")[n - 1]}
            assert used <= {*prose, *block.code(source)}


def test_blocks_of_a_file():
    starts = {block.first: block for block in split_blocks(METHOD)}
    line = {text.strip(): n for n, text in enumerate(METHOD.split("\n"), 1)}
    layer, forward = starts[line["# the square"]], starts[line["def forward(self, x):"]]
    assert [note[2][:11] for note in layer.notes] == ["the square", "A layer.\n\n$"]
    # an __init__ without prose, and comments inside of brackets, stay with the class
    assert layer.last == line["def forward(self, x):"] - 1
    assert forward.last == line["# why it is squared"] - 1
    comment = starts[line["# why it is squared"]]
    assert comment.notes[0][2] == "why it is squared\nover two lines"
    assert line["# (N, 2)"] in comment.code(METHOD)
    assert starts[line["# Layers"] - 1].is_heading()
    assert {line["TABLE = 1"], line["def plain(x): return x"]} <= set(starts)


def test_site_of_a_small_repository(repository):
    _, build = repository
    status, out = build()
    assert status == 0
    page, text = (out / "gat_fusion.html").read_text(), (out / "docs/gat_fusion.html").read_text()
    assert "<math" in page and '<a id="eq-1" href="#eq-1">(1)</a>' in page
    for name in ("Layer", "Layer.forward", "Layer.__init__", "plain", "layers", "L31"):
        assert page.count(f'id="{name}"') == 1, name
    assert '<summary>notation</summary><div><div class="scroll"><table>' in page
    assert 'Checked by <a href="tests/test_gat_fusion.html#test_layer">' in page
    assert "<pre><code>X --&gt; Y" in page
    hrefs = ("../gat_fusion.html", "../gat_fusion.html#Layer", "../gat_fusion.html#Layer.forward")
    for href in (*hrefs, "#a-part", "../tests/test_gat_fusion.html#test_layer"):
        assert f'href="{href}"' in text, href
    assert 'id="test_layer"' in (out / "tests/test_gat_fusion.html").read_text()
    assert "pre .k" in (out / "style.css").read_text()


def test_an_unknown_test_ends_the_build_with_one_sentence(repository):
    root, build = repository
    (root / "gat_fusion.py").write_text(METHOD.replace("Test: test_layer", "Test: test_nothing"))
    with pytest.raises(SystemExit, match=r"^gat_fusion.py names the test test_nothing, which"):
        build()


@pytest.mark.parametrize(
    "text, warning",
    [
        ("[gone](gone.md)", "docs/page.html: gone.md leads nowhere"),
        ("[gone](../gat_fusion.py#Gone)", "docs/page.html: ../gat_fusion.html#Gone leads nowhere"),
        ("[gone](#gone)", "docs/page.html: #gone leads nowhere"),
        ("![gone](gone.png)", "docs/page.html: gone.png leads nowhere"),
        ("$\\nonsense x$", "docs/page.md: $\\nonsense x$: \\nonsense is unknown"),
        ("$$x_{$$", "docs/page.md: $x_{$: MissingSuperScript"),
        ("$$x \\tag{1}$$\n\n$$y \\tag{1}$$", "docs/page.html: the anchor eq-1 stands twice"),
    ],
)
def test_what_is_broken_is_a_warning(repository, capsys, text, warning):
    root, build = repository
    (root / "docs/page.md").write_text(f"# Page\n\n{text}\n")
    assert build()[0] == 1
    printed = capsys.readouterr()
    assert warning in printed.err and printed.out.endswith("1 warnings\n")


@pytest.mark.parametrize(
    "latex", ["\\frac{a}", "a \\\\ b", "a & b", "\\mathbb 1", "x\theta", "\\begin{nothing} x"]
)
def test_latex_that_browsers_show_wrongly(latex):
    assert formula(latex, True)[1]


def test_formulas():
    shown, wrong = formula("\\begin{aligned} a &= \\log b \\\\ c &= d \\end{aligned}", True)
    assert not wrong and "<mtr>" in shown and '<mi class="name">log</mi>' in shown
    shown, wrong = formula("\\mathrm{LeakyReLU}(u^\\top x) \\tag{2-3}", True)
    assert not wrong and ">LeakyReLU</mi>" in shown and 'id="eq-2-3"' in shown
    assert '<mo lspace="0" rspace="0">' in shown and "tag" not in shown


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(Site of this repository, folder in which it stands)."""
    out = tmp_path_factory.mktemp("site")
    begin = time.process_time()
    site = annotate.Site(ROOT)
    site.build()
    site.write(out)
    assert time.process_time() - begin < 20
    return site, out


def test_site_has_no_warning(site):
    assert site[0].warnings == [] and set(annotate.METHODS) == set(site[0].methods)


def test_site_needs_neither_script_nor_network(site):
    for page, text in site[0].pages.items():
        assert "<script" not in text and not re.search(r"<[^>]* on\w+=", text), page
        assert not re.search(r'<(?!a )[^>]*(?:src|href)="(?:https?:)?//', text), page
    style = (site[1] / "style.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_every_definition_has_an_anchor_and_every_line_its_number(site):
    for path in annotate.METHODS:
        page, source = site[0].pages[annotate.page_of(path)], (ROOT / path).read_text("utf-8")
        for name in definitions(ast.parse(source)):
            assert f'id="{name}"' in page, name
        numbers = [int(n) for n in re.findall(r'id="L(\d+)"', page)]
        code = {n for block in split_blocks(source) for n in block.code(source)}
        assert numbers == sorted(numbers) and set(numbers) == code


def test_no_latex_is_left_as_text(site):
    """Formulas of the methods and pages, and dollars and commands outside of code."""
    for page in [annotate.page_of(path) for path in (*site[0].methods, *site[0].texts)]:
        text = re.sub(r"<(pre|code|title|style)\b.*?</\1>", "", site[0].pages[page], flags=re.S)
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
        assert not re.search(r"\$|\\[A-Za-z]+", text), page


def test_docstrings_with_formulas_are_raw():
    """Else Python reads \\n of \\nu as the end of a line."""
    for path in annotate.METHODS:
        source = (ROOT / path).read_text("utf-8")
        for note in re.findall(r'^\s*(r?"""[^"]*""")', source, re.M):
            assert note.startswith("r") or "$" not in note or "\\" not in note, note[:60]


@pytest.mark.parametrize("method", sorted(architecture.DESCRIPTIONS))
def test_figures_name_what_stands_in_the_file(method):
    title, boxes, arrows = architecture.DESCRIPTIONS[method]
    source = (ROOT / f"{method}.py").read_text("utf-8")
    names = definitions(ast.parse(source))
    for box in boxes:
        is_known = box.name in names or (box.name.startswith("nn.") and box.name in source)
        assert box.is_data or is_known, box.name
        for word in re.findall(r"[A-Z]\w+(?= x )", box.note):
            assert word in names, box.note
    drawn = architecture.figure(method, title, boxes, arrows)
    assert (architecture.FIGURES / f"{method}.svg").read_text("utf-8") == drawn


WRAPPER = """<!DOCTYPE html><title>widths</title>{frames}<pre></pre><script>
addEventListener("load", () => {{
  document.querySelector("pre").textContent = [...document.querySelectorAll("iframe")].map(
    (frame) => [frame.getAttribute("src"), frame.width,
      frame.contentDocument.documentElement.scrollWidth].join(" ")).join("\\n")
}})
</script>"""


def test_pages_fit_wide_and_narrow_windows(site):
    """Wide code and tables scroll in their own boxes, never the page; the console stays empty."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium to look at the pages with")
    pages = [annotate.page_of(path) for path in (*site[0].methods, *site[0].texts)]
    pages += ["tests/test_gat_fusion.html"]
    frames = [
        f'<iframe src="{page}" width="{width}" height="700" style="border: 0"></iframe>'
        for page in pages
        for width in (1280, 390)
    ]
    wrapper = site[1] / "widths.html"
    wrapper.write_text(WRAPPER.format(frames="".join(frames)))
    flags = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --dump-dom"
    command = [browser, *flags.split(), "--enable-logging=stderr", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)[1].split("\n")
    assert len(rows) == len(frames)
    for row in rows:
        page, width, scrolled = row.split()
        assert int(scrolled) <= int(width), f"{page} is {scrolled} px wide in {width} px"
    assert "CONSOLE" not in done.stderr
