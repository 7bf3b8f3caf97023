"""`make docs`: the notebooks and the package as a site that opens from the disk, with no network: `python tests/docs.py [DIRECTORY]`, _docs unless named.

Pages in reading order, a page for every public function and class (its source's words, shapes, and the notebook cell that uses it), a full-text search, formulas as MathML.
Nothing is imported and nothing runs: all is read from the notebooks. Ends with an error if a link leads nowhere."""
import ast
import json
import re
import shutil
import sys
import unicodedata
from collections import Counter
from functools import lru_cache, partial
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import jinja2
import mistune
import nbformat
from bs4 import BeautifulSoup, NavigableString
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(__file__).with_name("site")
PARTS = {"0": "A group", "1": "The cause", "2": "The objective", "3": "A run", "4": "Explore", "5": "Run by papermill"}
WIDGET = "application/vnd.jupyter.widget-view+json"
IGNORED = re.compile(r"^[%!].*$", re.M)


# ---- what is in the notebooks

class Page(NamedTuple):
    path: Path
    notebook: nbformat.NotebookNode
    title: str
    promise: str                  # the line after the title
    module: str                   # what it exports, or ""

    @property
    def part(self) -> str:
        return "" if self.path.stem == "index" else PARTS.get(self.path.stem[0], "Tours")


class Entry(NamedTuple):
    "A public function or class, and where it is defined."
    module: str
    node: ast.FunctionDef | ast.ClassDef
    source: str
    page: Page
    cell: int

    @property
    def url(self) -> str:  # classes apart, for file systems that take Run and run for one
        return f"api/{self.module}.{self.node.name}{'.class' * isinstance(self.node, ast.ClassDef)}.html"


def reading_order(root: Path = ROOT) -> list[Path]:
    "The front page, the numbered notebooks, and the tours as the front page names them."
    front = (root / "nbs" / "index.ipynb").read_text()
    named = lambda path: (front.find(f"`{path.stem}`") % sys.maxsize, path.stem)
    return [root / "nbs" / "index.ipynb", *sorted((root / "nbs").glob("[0-9]*.ipynb")), *sorted((root / "nbs" / "tours").glob("*.ipynb"), key=named)]


def read_page(path: Path) -> Page:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "outputs" in cell:  # without what has no other form than a widget: progress bars of programs that have ended
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) or "text/html" in o.data]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)
    head = notebook.cells[0].source
    title, promise = re.search(r"^# (.+)$", head, re.M)[1], re.search(r"^> ?(.+)$", head, re.M)
    module = re.search(r"^#\| ?default_exp (\w+)", "\n".join(c.source for c in notebook.cells), re.M)
    return Page(path, notebook, title if path.stem == "index" or path.parent.name == "tours" else path.stem, promise[1] if promise else "", f"gcpo.{module[1]}" if module else "")


def is_export(cell) -> bool:
    return cell.cell_type == "code" and bool(re.match(r"#\| ?export", cell.source))


def parsed(cell) -> ast.Module:
    return _parsed(cell.source)


@lru_cache(None)
def _parsed(source: str) -> ast.Module:
    return ast.parse(IGNORED.sub("pass", source))


@lru_cache(None)
def names_in(source: str) -> set[str]:
    "What a cell reads and does not set itself."
    names = [n for n in ast.walk(_parsed(source)) if isinstance(n, ast.Name)]
    return {n.id for n in names if isinstance(n.ctx, ast.Load)} - {n.id for n in names if isinstance(n.ctx, ast.Store)}


def entries(page: Page) -> list[Entry]:
    return [Entry(page.module, node, cell.source, page, i) for i, cell in enumerate(page.notebook.cells) if is_export(cell)
            for node in parsed(cell).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


def imports(page: Page) -> set[tuple[str, str]]:
    return {(n.module, a.name) for c in page.notebook.cells if c.cell_type == "code" for n in ast.walk(parsed(c)) if isinstance(n, ast.ImportFrom) for a in n.names if not a.asname}


def example(entry: Entry, imported: list[tuple[Page, set]]) -> tuple[Page, nbformat.NotebookNode, bool] | None:
    "The first cell that uses a function: after its export, else in a notebook that imports it, else (False) the next one that asserts."
    after = [c for c in entry.page.notebook.cells[entry.cell + 1:] if c.cell_type == "code" and not is_export(c)]
    others = ((p, c) for p, there in imported if p is not entry.page and (entry.module, entry.node.name) in there for c in p.notebook.cells if c.cell_type == "code" and not is_export(c))
    for page, cell in [*((entry.page, c) for c in after), *others]:
        if entry.node.name in names_in(cell.source):
            return page, cell, True
    return next(((entry.page, c, False) for c in after if re.search(r"\bassert\b|raises", c.source)), None)


# ---- signatures and shapes

def lineage(node: ast.ClassDef, classes: dict[str, tuple[ast.ClassDef, str]]) -> list[tuple[ast.ClassDef, str]]:
    "A class and its bases in the same module with their sources, the furthest base first."
    bases = [pair for base in reversed(node.bases) if isinstance(base, ast.Name) and base.id in classes for pair in lineage(classes[base.id][0], classes)]
    return [*bases, classes[node.name]]


def signature(node, source: str, classes: dict = {}) -> str:
    "The definition as it is written, without body and docstring; of a class its fields too, those of its bases first."
    lines, cut = source.splitlines(), node.col_offset
    head = lines[node.lineno - 1:node.body[0].lineno - 1] or [lines[node.lineno - 1]]
    fields = {f.target.id: "\n".join(text.splitlines()[f.lineno - 1:f.end_lineno]) for one, text in (lineage(node, classes) if isinstance(node, ast.ClassDef) else []) for f in one.body if isinstance(f, ast.AnnAssign)}
    return "\n".join([*(f"@{ast.unparse(d)}" for d in node.decorator_list), *(line[cut:] if not line[:cut].strip() else line for line in head), *fields.values()]).rstrip()


def methods(node: ast.ClassDef, classes: dict) -> dict[str, tuple[ast.FunctionDef, str]]:
    "Public methods by name with their sources, those of bases in the same module included."
    return {n.name: (n, source) for one, source in lineage(node, classes) for n in one.body if isinstance(n, ast.FunctionDef) and (not n.name.startswith("_") or n.name in ("__init__", "__call__"))}


def legend(page: Page) -> dict[str, str]:
    "What shape suffixes mean, from the sentence of a notebook that says so."
    said = re.search(r"Shape suffixes[^\n]*", "\n".join(c.source for c in page.notebook.cells if c.cell_type == "markdown"))
    return dict(re.findall(r"`_([A-Z])` ([^,.;`(]+\w)", said[0])) if said else {}


def shapes(text: str, meaning: dict[str, str]) -> dict[str, str]:
    return {name: " × ".join(meaning.get(axis, axis) for axis in name[re.search(r"(_[A-Z])+$", name).start() + 1:].split("_")) for name in dict.fromkeys(re.findall(r"\b\w+?(?:_[A-Z])+\b", text))}


# ---- HTML

def formula(tex: str, display: str = "inline") -> str:
    "MathML; letters that browsers no longer take from mathvariant become characters, and a function's name keeps its distance."
    mathml = convert(tex, display=display).replace(r">\{<", ">{<").replace(r">\}<", ">}<")  # of \Big\{
    mathml = re.sub(r'<m([in]) mathvariant="double-struck">(\w)</m', lambda m: f"<m{m[1]}>{double_struck(m[2])}</m", mathml)
    return re.sub(r"<mi>(\w{2,})</mi>(?=<m(?!o\b))", r'<mrow><mi>\1</mi><mspace width="0.17em"></mspace></mrow>', mathml)


def double_struck(letter: str) -> str:
    kind = "DIGIT " + unicodedata.name(letter).split()[-1] if letter.isdigit() else "CAPITAL " + letter
    try:
        return unicodedata.lookup(f"DOUBLE-STRUCK {kind}")
    except KeyError:
        return unicodedata.lookup(f"MATHEMATICAL DOUBLE-STRUCK {kind}")


class Renderer(IPythonRenderer):
    "Formulas as MathML, and names of notebooks and functions as links."
    links, up = {}, ""

    def block_math(self, body):
        return formula(body.strip(), "block")

    def inline_math(self, body):
        return formula(body.strip())

    def codespan(self, text):
        code, url = super().codespan(text), self.links.get(text)
        return f'<a href="{self.up}{url}">{code}</a>' if url else code


class Exporter(HTMLExporter):
    template_name = "basic"

    def markdown2html(self, context, source):
        renderer = Renderer(escape=False, embed_images=True, path=context.get("resources", {}).get("metadata", {}).get("path", ""))
        renderer.links = self.links
        return MarkdownWithMath(renderer=renderer).render(source)
    markdown2html = jinja2.pass_context(markdown2html)


def coloured(code: str) -> str:
    return highlight(code, PythonLexer(), HtmlFormatter())


def prose(text: str, links: dict[str, str]) -> str:
    "A docstring as it stands, its `names` marked and linked."
    def code(m):
        return f'<a href="../{links[m[1]]}"><code>{m[1]}</code></a>' if m[1] in links else f"<code>{m[1]}</code>"
    return re.sub(r"`([^`\n]+)`", code, escape(text, quote=False))


def tidy(text: str) -> str:
    return unicodedata.normalize("NFKC", " ".join(text.split()))


def sections(body: str) -> list[tuple[int, str, str, str]]:
    "(level, heading, anchor, words) of each part of a page, without outputs: what the search looks through."
    soup, found = BeautifulSoup(body, "html.parser"), [[0, "", "", []]]
    for output in soup.select(".output_wrapper, .anchor-link"):
        output.decompose()
    for node in soup.descendants:
        if node.name in ("h2", "h3", "h4") and node.get("id"):
            found.append([int(node.name[1]), tidy(node.get_text()), f"#{node['id']}", []])
        elif type(node) is NavigableString:
            found[-1][3].append(str(node))
    return [(*where, tidy("".join(words))) for *where, words in found]


# ---- the site

def build(out: Path, paths: list[Path] | None = None) -> list[str]:
    "Write the site of some notebooks (all, unless named) and return its broken links."
    pages = [read_page(p) for p in paths or reading_order()]
    exported = {p.path: entries(p) for p in pages}
    url = {p.path: f"{p.path.stem}.html" for p in pages}
    classes = {p.path: {n.name: (n, c.source) for c in p.notebook.cells if is_export(c) for n in parsed(c).body if isinstance(n, ast.ClassDef)} for p in pages}
    parts_of = {e.url: methods(e.node, classes[e.page.path]) if isinstance(e.node, ast.ClassDef) else {} for found in exported.values() for e in found}
    names = {".".join([e.module, e.node.name, *part]): e.url for found in exported.values() for e in found for part in [(), *((name,) for name in parts_of[e.url])]}
    links = {p.path.stem: url[p.path] for p in pages if re.search(r"\d|_", p.path.stem)} | {p.module: f"api/{p.module}.html" for p in pages if p.module} | names
    render = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template
    shutil.rmtree(out, ignore_errors=True)
    (out / "api").mkdir(parents=True)
    words, imported, core = [], [(p, imports(p)) for p in pages], legend(read_page(ROOT / "nbs" / "00_core.ipynb"))

    def write(template: str, address: str, title: str, **more) -> None:
        (out / address).write_text(render(template).render(title=title, up="../" * address.count("/"), **more))

    exporter = Exporter(embed_images=True)
    exporter.log.setLevel("ERROR")
    for before, page, after in zip([None, *pages], pages, [*pages[1:], None]):
        exporter.links = links | {e.node.name: e.url for e in exported[page.path]}
        body, _ = exporter.from_notebook_node(page.notebook, {"metadata": {"path": str(page.path.parent), "name": page.path.stem}})
        parts = sections(body)
        words += [(f"{page.title}: {heading}" if heading else page.title, url[page.path] + anchor, text) for _, heading, anchor, text in parts]
        write("notebook.html", url[page.path], page.title, page=page, body=body, before=before, after=after, url=url, contents=[(anchor, heading) for level, heading, anchor, _ in parts if level == 2],
              map=pages if page.path.stem == "index" else [], groups=list(dict.fromkeys(p.part for p in pages if p.part)))
        here = {e.node.name: e.url for e in exported[page.path]}
        describe = partial(prose, links=links | here)
        for e in exported[page.path]:
            parts = [(signature(n, s), ast.get_docstring(n) or "") for n, s in parts_of[e.url].values()]
            told, text, doc = example(e, imported), signature(e.node, e.source, classes[e.page.path]), ast.get_docstring(e.node) or ""
            words.append((f"{e.module}.{e.node.name}", e.url, tidy(" ".join([text, doc, *(t for part in parts for t in part)]))))
            write("function.html", e.url, f"{e.module}.{e.node.name}", entry=e, url=url, signature=coloured(text), doc=describe(doc), methods=[(coloured(s), describe(d)) for s, d in parts],
                  shapes=shapes("\n".join([text, *(s for s, _ in parts)]), core | legend(page)), cell=page.notebook.cells[e.cell].id, told=told and (told[0], told[1].id, coloured(told[1].source), told[2]))
        if page.module:
            write("module.html", f"api/{page.module}.html", page.module, page=page, url=url, entries=[(e.url.split("/")[1], e.node.name, describe((ast.get_docstring(e.node) or "").split("\n")[0])) for e in exported[page.path]])
    write("search.html", "search.html", "Search")
    shutil.copy(ASSETS / "search.js", out)
    (out / "style.css").write_text((ASSETS / "style.css").read_text() + HtmlFormatter().get_style_defs(".highlight"))
    (out / "words.js").write_text(f"const WORDS = {json.dumps(words, ensure_ascii=False)};\n")
    return broken_links(out)


class Links(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.targets = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [v for k, v in attrs if k == "id"]
        self.targets += [(tag, v) for k, v in attrs if k in ("href", "src", "action", "data", "poster") and v is not None]


def broken_links(site: Path) -> list[str]:
    "What leads nowhere: a page or an anchor that is not there, an id that is there twice, anything but a link to read that needs the network."
    read, wrong = {p: Links(p.read_text()) for p in site.rglob("*.html")}, []
    for page, links in read.items():
        here = page.relative_to(site)
        wrong += [f"{here}: the id {i} twice" for i in sorted(i for i, count in Counter(links.ids).items() if count > 1)]
        for tag, target in links.targets:
            if target.startswith("data:"):
                continue
            where = urlsplit(target)
            if where.scheme or where.netloc:
                wrong += [] if tag == "a" and where.scheme in ("https", "mailto") else [f"{here}: <{tag}> needs {target[:80]}"]
                continue
            other = (page.parent / unquote(where.path)).resolve() if where.path else page
            if not other.is_file():
                wrong.append(f"{here}: no page {target[:80]}")
            elif where.fragment and other in read and not {where.fragment, unquote(where.fragment)} & {*read[other].ids}:
                wrong.append(f"{here}: no anchor {target[:80]}")
    return wrong


if __name__ == "__main__":
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs")
    wrong = build(directory)
    sys.exit("\n".join(wrong) or None) if wrong else print(f"{len(list(directory.rglob('*.html')))} pages: open {directory / 'index.html'}")
