"""A Python file as blocks of prose and code: what docs/annotate.py puts side by side."""

import ast
import inspect
import io
import re
import tokenize
from dataclasses import dataclass, field

from pygments import highlight, lexers
from pygments.formatters import HtmlFormatter
from pygments.util import ClassNotFound

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def definitions(node, prefix=""):
    """{dotted name: node} of all classes and functions below a node."""
    out = {}
    for child in ast.iter_child_nodes(node):
        is_definition = isinstance(child, DEFINITIONS)
        name = f"{prefix}{child.name}" if is_definition else prefix
        if is_definition:
            out[name] = child
        out |= definitions(child, f"{name}." if is_definition else prefix)
    return out


def first_line(node):
    return min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))


def comment_notes(source):
    """[(first line, last line, markdown)] of comments that fill their lines, but for those inside
    brackets and those that are a shape; one with a rule of dashes is the heading of a section."""
    notes, depth, last = [], 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if token.type != tokenize.COMMENT or depth or not token.line.lstrip().startswith("#"):
            continue
        line, text = token.start[0], token.string.lstrip("#").removeprefix(" ")
        if line == last + 1:
            first, _, above = notes.pop()
            notes.append((first, line, f"{above}\n{text}"))
        elif not text.startswith("("):
            notes.append((line, line, text))
        else:
            continue
        last = line
    rule = re.compile(r"^[-=]{5,}$", re.M)
    return [(a, b, f"## {rule.sub('', s).strip()}" if rule.search(s) else s) for a, b, s in notes]


def docstring_note(node, lines):
    """[(first line, last line, markdown)] of the docstring, none where it shares a line."""
    value = node.body[0].value if ast.get_docstring(node) else None
    is_apart = value and re.match(r"\s*[rR]?[\"']", lines[value.lineno - 1])
    return [(value.lineno, value.end_lineno, inspect.cleandoc(value.value))] if is_apart else []


@dataclass
class Block:
    """Lines `first` to `last` of a file; notes [(first, last, markdown)] stand on the left."""

    first: int
    last: int
    notes: list = field(default_factory=list)

    def is_heading(self):
        return bool(self.notes) and self.notes[0][2].startswith("## ")

    def code(self, source):
        """Numbers of the lines that stand on the right, without empty ones at both ends."""
        lines = source.split("\n")
        prose = {n for first, last, _ in self.notes for n in range(first, last + 1)}
        numbers = [n for n in range(self.first, self.last + 1) if n not in prose]
        used = [n for n in numbers if lines[n - 1].strip()]
        return [n for n in numbers if used and used[0] <= n <= used[-1]]


def split_blocks(source):
    """[Block] that hold every line once: a definition with its docstring and the comment above it,
    a run of statements, a comment with the code below it."""
    lines, tree, notes = source.split("\n"), ast.parse(source), comment_notes(source)
    nodes, starts = definitions(tree), {1, *(first for first, _, _ in notes)}
    if ast.get_docstring(tree):
        starts.add(tree.body[0].end_lineno + 1)
    # the statements behind a definition
    pairs = zip(tree.body, tree.body[1:])
    starts |= {first_line(node) for before, node in pairs if isinstance(before, DEFINITIONS)}
    for name, node in nodes.items():
        parent = nodes.get(name.rpartition(".")[0], tree)
        is_inside = isinstance(parent, ast.FunctionDef) or node.name == "__init__"
        if docstring_note(node, lines) or not is_inside:
            starts.add(first_line(node))
    for _, last, text in notes:
        # a comment belongs to what stands right below, a heading does not
        starts = starts | {last + 1} if text.startswith("## ") else starts - {last + 1}
    for node in [tree, *nodes.values()]:
        notes += docstring_note(node, lines)
    starts = sorted(starts)
    blocks = [Block(a, b - 1) for a, b in zip(starts, [*starts[1:], len(lines) + 1])]
    for block in blocks:
        block.notes = sorted(note for note in notes if block.first <= note[0] <= block.last)
    return blocks


def highlighted(source, language):
    """HTML of each line of a text."""
    try:
        lexer = lexers.get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        lexer = lexers.get_lexer_by_name("text", stripnl=False)
    return highlight(source, lexer, HtmlFormatter(nowrap=True)).removesuffix("\n").split("\n")


def code_box(lines, numbers, anchors):
    """A box of the lines with these numbers; anchors {number: id}."""
    rows = []
    for n in numbers:
        anchor = f' id="{anchors[n]}"' if n in anchors else ""
        rows.append(
            f'<span{anchor}><a id="L{n}" href="#L{n}" data-n="{n}"></a>{lines[n - 1]}</span>'
        )
    return f'<div class="code"><pre>{"".join(rows)}</pre></div>'
