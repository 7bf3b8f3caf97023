"""The documentation as it is built: no link leads nowhere, formulas are MathML, every public function has its page, the search finds, and nothing asks the network.

A site of three notebooks by default; the whole one, which takes two minutes, is slow."""
import html
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT

import docs

BROWSER = next(filter(None, map(shutil.which, filter(None, [os.environ.get("GCPO_BROWSER"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]))), None)
FEW = ("index", "10_scm", "12_upsilon")
ORDER = docs.reading_order()


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def site(request, tmp_path_factory):
    "A built site: its directory, its notebooks in order, and the links that its build found broken."
    directory, paths = tmp_path_factory.mktemp("docs") / request.param, [p for p in ORDER if request.param == "all" or p.stem in FEW]
    return SimpleNamespace(directory=directory, paths=paths, broken=docs.build(directory, paths), read={})


def soup(site, address):
    if address not in site.read:
        site.read[address] = BeautifulSoup((site.directory / address).read_text(), "html.parser")
    return site.read[address]


def test_no_link_is_broken(site):
    assert site.broken == []


@pytest.mark.parametrize("wrong, told", [('<a href="12_upsilonn.html">', "no page 12_upsilonn.html"), ('<a href="12_upsilon.html#Step-6">', "no anchor 12_upsilon.html#Step-6"), ('<a href="#Step-6">', "no anchor #Step-6"), ('<p id="map">', "the id map twice"),
                                         ('<script src="https://cdn.example.org/require.js">', "<script> needs https://cdn.example.org/require.js"), ('<img src="//example.org/a.png">', "<img> needs //example.org/a.png"), ('<a href="http://example.org">', "<a> needs http://example.org")])
def test_the_checker_sees(site, wrong, told, tmp_path):
    copy = tmp_path / "site"
    shutil.copytree(site.directory, copy)
    with open(copy / "index.html", "a") as page:
        page.write(wrong)
    assert docs.broken_links(copy) == [f"index.html: {told}"]


def test_notebooks_stand_in_reading_order(site):
    names = [p.stem for p in site.paths]
    assert names[0] == "index" and names[1:] == [*sorted(n for n in names if n[0].isdigit()), *(n for n in names[1:] if not n[0].isdigit())]
    for before, here, after in zip([None, *names], names, [*names[1:], None]):
        page = soup(site, f"{here}.html")
        for rel, neighbour in (("prev", before), ("next", after)):
            assert {a["href"] for a in page.select(f"a[rel={rel}]")} == ({f"{neighbour}.html"} if neighbour else set())
    listed = [a["href"] for a in soup(site, "index.html").select("#map ~ ul > li > a:first-child")]
    assert listed == [f"{n}.html" for n in names[1:]], "the map has every page, in order"


def test_every_public_function_has_a_page_with_its_words(site):
    pages = [docs.read_page(p) for p in site.paths]
    entries = [e for p in pages for e in docs.entries(p)]
    assert len({e.url.lower() for e in entries}) == len(entries) > 15
    for e in entries:
        page = soup(site, e.url)
        said = " ".join((docs.ast.get_docstring(e.node) or "").replace("`", "").split())
        assert said and said == " ".join(page.select_one(".doc").get_text().split()), e.url
        assert page.h1.text == f"{e.module}.{e.node.name}" and e.node.name in page.select_one(".highlight").text
        assert f"#cell-id={e.page.notebook.cells[e.cell].id}" in page.select(".skip a")[1]["href"]
        assert e.node.name in page.select(".highlight")[-1].text or page.select_one("#example").text == "Tested with its neighbours", e.url
    for module in filter(None, (p.module for p in pages)):
        assert len(soup(site, f"api/{module}.html").select("main tr")) == sum(e.module == module for e in entries)


def test_a_functions_page(site):
    page = soup(site, "api/gcpo.upsilon.projected.html")
    assert page.select_one(".highlight").text.strip() == "def projected(z_G_D, Z_G_J_M_D, own_draw=True):"
    assert "Raises ValueError on shapes that do not fit, J < 2" in page.select_one(".doc").text
    assert [[td.text for td in row.select("td")] for row in page.select("tr")] == [["z_G_D", "the group's responses × hidden size"], ["Z_G_J_M_D", "the group's responses × collider draws × continuations × hidden size"]]
    assert "v_hand = projected(z_hand, Z_hand)" in page.select(".highlight")[-1].text
    inherited = soup(site, "api/gcpo.scm.DiscreteSCM.class.html").text
    assert "def theorem1(self, f) -> Sides:" in inherited and "def phi(self, f" in inherited and "prior_Q: Tensor" in inherited, "methods and fields of its bases too"


def test_formulas_are_mathml(site):
    count = 0
    for path in site.paths:
        page = soup(site, f"{path.stem}.html")
        formulas = page.select("math")
        count += len(formulas)
        for m in formulas:
            assert m.get_text(strip=True) and "\\" not in m.get_text() and not m.select("[mathvariant=double-struck], merror"), (path.stem, str(m))
        for prose in page.select(".text_cell_render"):
            words = "".join(s for s in prose.find_all(string=True) if not s.find_parent(["code", "pre"]))
            assert not re.search(r"\$[^$\s][^$]*\\[a-z]", words), f"{path.stem}: a formula was left as it is written"
    assert count > 300


def test_formulas_that_the_converter_gets_wrong():
    assert "𝔼" in docs.formula(r"\mathbb E x") and "ℝ" in html.unescape(docs.formula(r"\mathbb{R}")) and "\\" not in docs.formula(r"\Big\{x\Big\}")
    assert '<mrow><mi>log</mi><mspace width="0.17em"></mspace></mrow><mi>p</mi>' in docs.formula(r"\log p") and "mspace" not in docs.formula(r"\log(p)")


def test_cells_and_outputs_are_there(site):
    for path in site.paths:
        page, cells = soup(site, f"{path.stem}.html"), docs.read_page(path).notebook.cells
        assert len(page.select(".code_cell")) == sum(c.cell_type == "code" for c in cells)
        pictures = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
        assert len(page.select(".output_png img")) == pictures and all(i["src"].startswith("data:image/") for i in page.select("img"))
        assert not page.select("script, link[href*='//'], iframe")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright; its own browsers are not needed)")
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on the path, and $GCPO_BROWSER names none")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        context = chromium.new_context(viewport={"width": 1300, "height": 1000})
        context.set_offline(True)
        yield context
        chromium.close()


def opened(browser, site, address):
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(f"error {error}"))
    page.goto((site.directory / address).as_uri())
    return page, asked


def test_it_opens_from_the_disk_with_the_network_cut(browser, site):
    page, asked = opened(browser, site, "10_scm.html")
    sizes = page.locator("math").evaluate_all("all => all.map(m => [m.getBoundingClientRect().width, m.getBoundingClientRect().height])")
    assert len(sizes) > 100 and all(w > 3 and h > 5 for w, h in sizes)
    fraction = page.locator("mfrac").first.evaluate("f => [...f.children].map(c => c.getBoundingClientRect().top)")
    assert fraction[0] < fraction[1], "the browser lays MathML out"
    assert page.locator("img").count() >= 5 and all(page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth > 0)"))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
    assert all(url.startswith(("file:", "data:")) for url in asked)
    if os.environ.get("GCPO_SCREENSHOTS"):
        page.screenshot(path=f"{os.environ['GCPO_SCREENSHOTS']}/docs_scm.png")
    page.close()


def test_the_search_finds(browser, site):
    page, asked = opened(browser, site, "12_upsilon.html")
    field = page.get_by_role("searchbox", name="Search")
    field.fill("qwertyuiop")
    field.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    assert page.locator("#count").text_content() == "0 sections hold “qwertyuiop”"
    page.get_by_role("searchbox", name="Search").fill("median RAISES scale")
    page.get_by_role("searchbox", name="Search").press("Enter")
    page.locator("#hits li").first.wait_for()
    hits = page.locator("#hits li a").all_text_contents()
    assert "gcpo.upsilon.euclidean" in hits and page.locator("#hits mark").count() >= len(hits)
    page.get_by_role("link", name="gcpo.upsilon.euclidean").click()
    page.wait_for_url("**/api/gcpo.upsilon.euclidean.html")
    page.goto((site.directory / "search.html").as_uri() + "?q=" + "%3Cimg+src%3Dx+onerror%3Dalert(1)%3E+(")
    assert "<img src=x onerror=alert(1)> (" in page.locator("#count").text_content() and page.locator("main img").count() == 0, "a question is text"
    page.goto((site.directory / "search.html").as_uri() + "?q=Υ+Gaussian")
    assert page.locator("#hits li").count() > 0, "letters of formulas are found too"
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()
