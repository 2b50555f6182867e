"""The reading pages as a static site: docs/*.md, and each method file with its prose beside its
code: python -m docs.annotate [--out runs/site] (make docs).

Docstrings and full-line comments are markdown with LaTeX between dollars, which becomes MathML;
`\\tag{3}` makes the anchor #eq-3. A line `Test: name[, name]` leads to the tests. The table in the
docstring of a file is its notation. Links are written as in the repository, such as
`../gat_fusion.py#GraphAttention`; a name in backticks leads to its definition. The status is 1 if a
test does not exist, a link or an anchor is broken, or LaTeX cannot be shown.
"""

import argparse
import ast
import html
import re
import sys
from collections import Counter
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments.formatters import HtmlFormatter

from docs.blocks import code_box, definitions, first_line, highlighted, split_blocks
from docs.mathml import formula

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("gat_fusion.py", "multist.py", "stformer.py", "cmrcnet.py", "spatia.py")
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
MARKDOWN.use(dollarmath_plugin, allow_space=False, allow_digits=False, allow_labels=False)
MARKDOWN.use(anchors_plugin, max_level=4)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="{up}style.css">
</head><body>
{body}
</body></html>
"""


def page_of(path):
    """Path of the page of a file, below the site."""
    return "index.html" if path == "README.md" else re.sub(r"\.(md|py)$", "", path) + ".html"


def menu(title, content):
    """A title that opens without a script."""
    return f'<details name="menu"><summary>{title}</summary><div>{content}</div></details>'


class Site:
    """pages {path: HTML}, pictures {path}, warnings [sentence] of the repository at `root`."""

    def __init__(self, root):
        self.root, self.pages, self.pictures, self.warnings = Path(root), {}, set(), []
        texts = [*sorted(self.root.glob("*.md")), *sorted(self.root.glob("docs/*.md"))]
        self.texts = [path.relative_to(self.root).as_posix() for path in texts]
        self.methods = [path for path in METHODS if (self.root / path).exists()]
        self.names = {path: definitions(ast.parse(self.read(path))) for path in self.methods}
        # other files that a page links to are shown as they are
        self.linked, self.tests = set(), {}
        for path in sorted(self.root.glob("tests/test_*.py")):
            for name in definitions(ast.parse(path.read_text("utf-8"))):
                self.tests.setdefault(name, f"tests/{path.name}")

    def read(self, path):
        return (self.root / path).read_text("utf-8")

    def build(self):
        for path in self.texts:
            title = re.search(r"^# (.*)", self.read(path), re.M)[1]
            self.add(path, title, f"<main>{self.prose(self.read(path), path)}</main>")
        for path in self.methods:
            self.add(path, path, self.method_page(path))
        for path in sorted(self.linked):
            self.add(path, path, self.source_page(path))
        self.check()

    def add(self, path, title, body):
        page = page_of(path)
        folder = dirname(page) or "."
        line, pages = [f'<a href="{relpath("index.html", folder)}">plainst</a>'], []
        for other in [*self.methods, *self.texts]:
            links = line if other in self.methods else pages
            links.append(f'<a href="{relpath(page_of(other), folder)}">{Path(other).stem}</a>')
        navigation = f"<nav>{' '.join(line)} {menu('pages', ' '.join(pages))}</nav>"
        up, title = "../" * page.count("/"), html.escape(title)
        self.pages[page] = PAGE.format(title=title, up=up, body=f"{navigation}\n{body}")

    def prose(self, text, path):
        """HTML of markdown that stands in the file at `path`."""
        tokens = MARKDOWN.parse(text)
        for token in tokens:
            self.translate(token, path)
            is_linked = False
            for child in token.children or ():
                is_linked = child.type == "link_open" or (is_linked and child.type != "link_close")
                if not (is_linked and child.type == "code_inline"):
                    self.translate(child, path)
        return MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})

    def translate(self, token, path):
        """Turn a formula, link, picture, name, program or table into what stands on the page."""
        shown = ""
        if token.type.startswith("math"):
            shown, wrong = formula(token.content, token.type == "math_block")
            if wrong:
                self.warnings.append(f"{path}: ${' '.join(token.content.split())}$: {wrong}")
        elif token.type == "link_open":
            token.attrSet("href", self.link(token.attrGet("href"), path, page_of(path)))
        elif token.type == "image":
            shown = self.picture(token.attrGet("src"), token.content, path)
        elif token.type == "code_inline":
            shown = self.name(token.content, path)
        elif token.type == "fence":
            lines = highlighted(token.content, token.info.strip())
            shown = '<pre class="box">{}</pre>'.format("\n".join(lines))
        elif token.type == "table_open":
            shown = '<div class="scroll"><table>'
        elif token.type == "table_close":
            shown = "</table></div>"
        if shown:
            token.type, token.content = "html_inline", shown

    def name(self, name, path):
        """A name in backticks, with a link if this page's method, a test or a file is called so."""
        own = path if path in self.methods else f"{Path(path).stem}.py"
        target = ""
        if name in self.names.get(own, ()):
            target = f"{own}#{name}"
        elif name in self.tests:
            target = f"{self.tests[name]}#{name}"
        elif re.fullmatch(r"[\w/]+\.(py|md)", name) and (self.root / name).is_file():
            target = name
        code = f"<code>{html.escape(name)}</code>"
        return f'<a href="{self.link(target, "", page_of(path))}">{code}</a>' if target else code

    def link(self, href, path, page):
        """Where a link in the file at `path` leads from a page; `check` sees what leads nowhere."""
        name, mark, anchor = href.partition("#")
        target = normpath(join(dirname(path), name))
        if ":" in href or not name or not (self.root / target).is_file():
            return href
        if target not in (*self.texts, *self.methods):
            self.linked.add(target)
        return relpath(page_of(target), dirname(page) or ".") + mark + anchor

    def picture(self, source, alt, path):
        """A picture; an SVG stands in the page itself, so that its links work."""
        target = normpath(join(dirname(path), source))
        if (self.root / target).is_file() and source.endswith(".svg"):
            return self.drawing(target, page_of(path))
        if (self.root / target).is_file():
            self.pictures.add(target)
        return f'<img src="{html.escape(source)}" alt="{html.escape(alt)}">'

    def drawing(self, path, page):
        parts = re.split(r'(?<=href=")([^"#][^"]*)', self.read(path))
        parts[1::2] = [self.link(href, path, page) for href in parts[1::2]]
        return f'<div class="figure">{"".join(parts)}</div>'

    def source_page(self, path):
        source = self.read(path)
        lines = highlighted(source, Path(path).suffix[1:] or "text")
        nodes = definitions(ast.parse(source)) if path.endswith(".py") else {}
        anchors = {node.lineno: name for name, node in nodes.items()}
        return f"<main><h1>{path}</h1>{code_box(lines, range(1, len(lines) + 1), anchors)}</main>"

    def note(self, text, path):
        """HTML of a docstring or comment, with links to the tests that it names."""
        parts = re.split(r"^Test: ([\w,\s]+?)(?=\n\n|\Z)", text, flags=re.M)
        for number in range(1, len(parts), 2):
            names = re.findall(r"\w+", parts[number])
            for name in set(names) - set(self.tests):
                raise SystemExit(f"{path} names the test {name}, which is nowhere in tests/")
            links = ", ".join(f"[`{name}`]({self.tests[name]}#{name})" for name in names)
            parts[number] = f"\n\nChecked by {links}"
        shown = self.prose("".join(parts), path)
        return shown.replace("<p>Checked by", '<p class="test">Checked by')

    def method_page(self, path):
        """Contents and notation in reach, the docstring of the file, then prose beside code."""
        source = self.read(path)
        lines, (first, *blocks) = highlighted(source, "python"), split_blocks(source)
        if first.code(source):
            raise SystemExit(f"{path} must begin with a docstring")
        names = {first_line(node): name for name, node in self.names[path].items()}
        rows, contents = [], []
        for block in blocks:
            text = "".join(self.note(note, path) for _, _, note in block.notes)
            numbers = block.code(source)
            name = names.get(numbers[0]) if numbers else None
            if name and "." not in name:
                contents.append(f'<a href="#{name}">{name}</a>')
            if block.is_heading():
                contents.append(re.sub("h2.*?>", "b>", text))
                rows.append(text)
            elif text or numbers:
                title = f'<h3 id="{name}"><a href="#{name}">{name}</a></h3>' if name else ""
                anchors = {n: names[n] for n in numbers[1:] if n in names}
                code = code_box(lines, numbers, anchors) if numbers else ""
                rows.append(f'<section><div class="prose">{title}{text}</div>{code}</section>')
        menus, figure = menu("contents", " ".join(contents)), f"docs/figures/{path[:-3]}.svg"
        intro = "".join(note for _, _, note in first.notes)
        table = re.search(r"(?:^\|.*\n?)+", intro, re.M)
        if table:
            menus += menu("notation", self.prose(table[0], path))
        intro = self.note(intro, path)
        if (self.root / figure).exists():
            intro = self.drawing(figure, page_of(path)) + intro
        aside = self.prose(f"[results and exercises](docs/{path[:-3]}.md)", path)
        body = f'<main class="file"><h1>{path}</h1>{intro}{"".join(rows)}</main>'
        return f'<div class="bar">{menus}{aside}</div>{body}'

    def check(self):
        """Note links, pictures and anchors that lead nowhere, and anchors that stand twice."""
        pages, files = self.pages.items(), {"style.css", *self.pages, *self.pictures}
        ids = {page: re.findall(r'<\w[^>]*? id="([^"]*)"', text) for page, text in pages}
        for page, names in ids.items():
            twice = [name for name, n in Counter(names).items() if n > 1]
            self.warnings += [f"{page}: the anchor {name} stands twice" for name in twice]
        for page, text in pages:
            for href in sorted(set(re.findall(r'<\w[^>]*? (?:href|src)="([^"]*)"', text))):
                if re.match("https?:|mailto:|data:", href):
                    continue
                name, _, anchor = href.partition("#")
                target = normpath(join(dirname(page), name)) if name else page
                if target not in files or (anchor and anchor not in ids[target]):
                    self.warnings.append(f"{page}: {href} leads nowhere")

    def write(self, out):
        """All pages, pictures and style.css below the folder `out`."""
        style = Path(__file__).with_name("style.css").read_text("utf-8")
        style += HtmlFormatter(style="tango", nobackground=True).get_style_defs("pre")
        files = {path: (self.root / path).read_bytes() for path in self.pictures}
        files |= {page: text.encode() for page, text in self.pages.items()}
        for path, content in (files | {"style.css": style.encode()}).items():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(content)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/site"), help="folder of the site")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository that it shows")
    flags = parser.parse_args(argv)
    site = Site(flags.root)
    site.build()
    site.write(flags.out)
    for warning in site.warnings:
        print(warning, file=sys.stderr)
    print(f"{flags.out / 'index.html'}: {len(site.pages)} pages, {len(site.warnings)} warnings")
    return 1 if site.warnings else 0


if __name__ == "__main__":
    sys.exit(main())
