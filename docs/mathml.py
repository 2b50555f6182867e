"""LaTeX -> MathML, which browsers show without a script."""

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

N_PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "msubsup": 3, "munder": 2, "mover": 2, "munderover": 3}
# what style.css can show; double-struck and script letters are characters of their own
VARIANTS = {None, "normal", "bold-italic", "monospace"}


def formula(latex, is_display):
    """(HTML, what is wrong with it or ""); the number of an equation, \\tag{2}, is its anchor."""
    tag = re.search(r"\\tag\{([^}]*)\}", latex)
    shown, wrong = mathml(latex.replace(tag[0], "") if tag else latex, is_display)
    if not is_display:
        return shown, wrong
    link = ""
    if tag:
        anchor = "eq-" + re.sub(r"[^\w.]+", "-", tag[1])
        link = f'<a id="{anchor}" href="#{anchor}">({html.escape(tag[1])})</a>'
    return f'<div class="equation"><div>{shown}</div>{link}</div>', wrong


def mathml(latex, is_display):
    """(MathML of a formula, what is wrong with it or "")."""
    latex = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{align*}", latex.strip())
    try:
        shown = convert(latex, display="block" if is_display else "inline")
        tree = ElementTree.fromstring(shown)
    except Exception as error:  # the library's errors have no class in common
        return html.escape(latex), f"{type(error).__name__} {error}".strip()
    if re.search(r"[\a\b\f\r\t\v]", latex):
        return html.escape(latex), 'the docstring must be raw, r"""'
    wrong = [sentence for node in tree.iter() for sentence in complaints(node)]
    # letters of \mathrm one by one -> a word; names of functions, which style.css sets apart
    shown = re.sub(r'(?:<mi mathvariant="normal">\w</mi>){2,}', word, shown)
    shown = re.sub(r"<m[io]>([A-Za-z]{2,})</m[io]>", r'<mi class="name">\1</mi>', shown)
    # no space around a sign that is an index or a power
    shown = re.sub(r"<mo>([^<]*</mo></msu)", r'<mo lspace="0" rspace="0">\1', shown)
    return shown, ", ".join(wrong)


def word(match):
    return f"<mi>{re.sub('<[^>]*>', '', match[0])}</mi>"


def complaints(node):
    """What a browser would show wrongly of an element of MathML."""
    tag = node.tag.split("}")[1]
    if "\\" in (node.text or ""):
        yield f"{node.text} is unknown"
    if len(node) != N_PARTS.get(tag, len(node)) or (tag == "mo" and not node.text):
        yield f"a part of <{tag}> is missing"
    if node.get("linebreak"):
        yield "a line break outside of aligned"
    if node.get("mathvariant") not in VARIANTS:
        yield f"no browser shows the variant {node.get('mathvariant')} of {node.text}"
