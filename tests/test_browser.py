"""The applications in a real browser: JupyterLab with a live kernel, a saved notebook without one, and reports with the network cut.

Needs Chromium or Chrome ($GCPO_BROWSER names another) and playwright; skipped, with the reason, where one is missing. $GCPO_SCREENSHOTS: a directory for the pictures.
Two of them stand in 40_explore; to take them anew: GCPO_SCREENSHOTS=shots python -m pytest tests/test_browser.py && cp shots/explore_*.png nbs/images"""
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from conftest import BIN, ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright; its own browsers are not needed)")

BROWSER = next(filter(None, map(shutil.which, filter(None, [os.environ.get("GCPO_BROWSER"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path, and $GCPO_BROWSER names none (Debian: apt-get install chromium)")
PATIENCE = 300  # seconds that a slow machine may take for any one thing
EXPLORE = ROOT / "nbs" / "40_explore.ipynb"


# ---- the browser, JupyterLab, pictures

@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    "Where pictures go."
    directory = Path(os.environ.get("GCPO_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def visit(browser, url, offline=False, scheme="light", height=950):
    "A page of its own, and what it asked for."
    context = browser.new_context(viewport={"width": 1560, "height": height}, color_scheme=scheme)
    context.set_default_timeout(1000 * PATIENCE)
    context.set_offline(offline)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    return page, asked


def stop(process):
    "End a process and all that it started, kernels in sessions of their own included."
    family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else [process]
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        pass
    for one in family:
        try:
            one.kill()
            one.wait(10)
        except (psutil.NoSuchProcess, ProcessLookupError, psutil.TimeoutExpired):
            pass


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab of our own over a copy of 40_explore, and the copy."
    home = tmp_path_factory.mktemp("jupyter")
    copy = home / "work" / EXPLORE.name
    copy.parent.mkdir()
    shutil.copy(EXPLORE, copy)
    shutil.copytree(EXPLORE.parent / "images", copy.parent / "images")
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    whole = home / "settings" / "@jupyterlab" / "notebook-extension"
    whole.mkdir(parents=True)
    (whole / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))  # else what is out of view is not on the page
    (quiet / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {f"JUPYTER_{what.upper()}_DIR": str(home / what) for what in ("config", "data", "runtime")} | {f"JUPYTERLAB_{what.upper()}_DIR": str(home / what) for what in ("settings", "workspaces")}
    command = [BIN / "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={copy.parent}"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=copy.parent, start_new_session=True, env={**os.environ, **places, "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(f"http://127.0.0.1:{port}/api/status"):
            assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-3000:]
            time.sleep(.1)
        yield f"http://127.0.0.1:{port}/lab/tree/{copy.name}", copy
    finally:
        stop(server)


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def numbers(app, column):
    "A column of the shown table of weights, as text."
    return app.locator(f'.gcpo-numbers td[data-column="{column}"]').all_text_contents()


def until(condition, what):
    "What a condition on the page comes to be, by looking again."
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(.05)
    return found


# ---- with a kernel

@pytest.fixture(scope="module")
def notebook(lab, browser, shots):
    "40_explore in JupyterLab, run from top to bottom."
    address, copy = lab
    page, _ = visit(browser, address, height=1700)
    before = page.locator("[class^=gcpo-static-]").first
    before.wait_for(state="visible")
    before.scroll_into_view_if_needed()
    assert "no kernel is alive" in before.text_content() and page.get_by_text("Error displaying widget").locator("visible=true").count() == 0, "a saved notebook shows pictures, not broken widgets"
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    failed, last = page.locator(".jp-Notebook .jp-RenderedText", has_text="Traceback (most recent call last)"), page.locator(".jp-CodeCell .jp-InputArea-prompt").last
    until(lambda: failed.count() or re.match(r"\[\d+\]", last.text_content().strip()), "all cells have run")
    assert not failed.count(), failed.first.text_content()
    yield page
    page.screenshot(path=shots / "notebook_end.png")
    page.context.close()


def app_with(page, control):
    "The application on the page that has a control, in view."
    app = page.locator(f".gcpo-app:has(.gcpo-{control})").first
    app.wait_for(state="visible")
    app.scroll_into_view_if_needed()
    return app


def chosen(app, control):
    return app.locator(f".gcpo-{control} select").evaluate("e => e.selectedOptions[0].textContent.trim()").replace("\xa0", " ")


def expected(app):
    "The table that belongs to the controls as the page shows them."
    from gcpo.record import load_group
    from gcpo.views import weights_table
    rule = chosen(app, "rule")
    return weights_table(load_group("figure-1"), float(app.locator(".gcpo-alpha .widget-readout").text_content()), chosen(app, "similarity"),
                         int(chosen(app, "draws")) if rule == "projected" else None, rule, chosen(app, "weighting"))


def agrees(app):
    table = expected(app)
    return all(numbers(app, column) == [f"{v:.3f}".replace("-0.000", "0.000") for v in table[column]] for column in ("A", "upsilon", "B"))


def test_a_slider_moves_the_numbers(notebook, shots):
    app = app_with(notebook, "alpha")
    until(lambda: agrees(app), "numbers of the controls as they stand after the notebook's own cells")
    before, handle = numbers(app, "B"), app.locator(".gcpo-alpha .noUi-handle")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    notebook.mouse.move(x, y)
    notebook.mouse.down()
    notebook.mouse.move(x - 40, y, steps=8)
    notebook.mouse.up()
    until(lambda: numbers(app, "B") != before and agrees(app), "B follows the slider")
    dragged = float(app.locator(".gcpo-alpha .widget-readout").text_content())
    handle.focus()
    notebook.keyboard.press("ArrowRight")
    until(lambda: abs(float(app.locator(".gcpo-alpha .widget-readout").text_content()) - dragged - .1) < 1e-6 and agrees(app), "the keyboard moves it too")
    top, numbers_ = app.bounding_box(), app.locator(".gcpo-numbers").bounding_box()
    notebook.screenshot(path=shots / "explore_group.png", clip={**top, "height": numbers_["y"] + numbers_["height"] + 8 - top["y"]})


def test_figures_are_as_wide_as_their_place(notebook):
    "Also those that no control has redrawn, and without a button that uploads them."
    for figure in notebook.locator(".gcpo-figure .js-plotly-plot").all():
        place = figure.bounding_box()["width"]
        until(lambda: abs(figure.locator("svg.main-svg").first.bounding_box()["width"] - place) < 2, f"as wide as its place, {place}")
        assert place > 1000
    assert notebook.locator(".gcpo-figure").count() >= 5 and notebook.get_by_role("button", name="Share").count() == 0


def test_controls_have_names(notebook):
    "What a screen reader calls them; sliders have none, as 40_explore says (when this fails, say so no longer)."
    apps, named = notebook.locator(".gcpo-app"), re.compile(r"\S")
    for role, least in {"combobox": 10, "checkbox": 4, "textbox": 1, "button": 10}.items():
        assert least <= apps.get_by_role(role).count() == apps.get_by_role(role, name=named).count(), role
    assert apps.get_by_role("slider").count() == 4 and apps.get_by_role("slider", name=named).count() == 0


def test_a_selected_response_is_marked_everywhere(notebook, shots):
    app = app_with(notebook, "alpha")
    app.locator(".gcpo-response select").select_option("y_4")
    app.locator('.gcpo-card.gcpo-selected[data-response="4"]').wait_for()
    assert app.locator(".gcpo-numbers tr.gcpo-selected").text_content().startswith("▶ y_4") and app.locator(".gcpo-card.gcpo-selected").count() == 1
    until(lambda: "▶ y_4" in app.locator("svg.main-svg").first.text_content(), "the figure's axis")
    assert app.locator("svg.main-svg .shapelayer path").count() == 8, "row and column in four matrices"
    app.locator(".gcpo-tokens").first.wait_for()
    until(lambda: app.locator("b", has_text=re.compile("^y_4$")).count() == 1, "its tokens")
    bar = app.locator("svg.main-svg .barlayer .trace").nth(0).locator(".point").nth(1)
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    notebook.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    app.locator('.gcpo-card.gcpo-selected[data-response="1"]').wait_for()
    assert chosen(app, "response") == "y_1" and agrees(app)


def test_a_toggle_conditions_on_the_collider(notebook, shots):
    from gcpo.views import scm_table
    app = app_with(notebook, "know-yn")
    told = lambda: app.locator("svg.main-svg").filter(has_text="correlation").first.text_content()
    value = lambda name: float(app.locator(f".gcpo-{name} .widget-readout").text_content())
    table = lambda: scm_table(value("q-to-y"), value("y-to-yn"), value("noise"), chosen(app, "predictor"))
    check = lambda name: app.locator(f".gcpo-{name} input[type=checkbox]")
    until(lambda: f"{table()['correlation given nothing']:+.3f}" in told(), "nothing is known after the notebook's own cells")
    check("know-q").check()
    until(lambda: f"given q: correlation {table()['correlation given q']:+.3f}" in told(), "given q, independent")
    check("know-yn").check()
    until(lambda: f"given q and y_n: correlation {table()['correlation given q and y_n']:+.3f}" in told(), "given q and y_n, dependent")
    assert table()["correlation given q"] == pytest.approx(0, abs=1e-12) and table()["correlation given q and y_n"] < -.5
    app.locator("summary").click()
    until(lambda: app.locator('td[data-name="R(f)"]').text_content() == f"{table()['R(f)']:.4f}", "the table below")
    app.screenshot(path=shots / "explore_collider.png")


def test_completions_are_searched(notebook, shots):
    app = app_with(notebook, "search")
    before = app.locator(".gcpo-completions tbody tr").count()
    box = app.locator(".gcpo-search input")
    box.fill("no such text")
    box.press("Enter")
    until(lambda: app.locator(".gcpo-count").text_content().startswith("0 completions"), "nothing holds that text")
    box.fill("")
    box.press("Enter")
    until(lambda: app.locator(".gcpo-completions tbody tr").count() > 0, "all again")
    assert before > 0 and app.locator("svg.main-svg .scatterlayer .trace").count() > 4
    app.screenshot(path=shots / "lab_run.png")


def test_the_notebook_ran_without_errors_and_keeps_its_pictures(notebook, lab):
    "The live applications stand alone; the pictures that a reader without a kernel will see are saved behind them."
    parts = notebook.locator("[class^=gcpo-static-]")
    until(lambda: notebook.locator("[class^=gcpo-static-] img").count() >= 4, "pictures are drawn")
    before = lab[1].stat().st_mtime_ns
    notebook.locator('[data-jp-item-name="save"]').first.click()  # Ctrl-S does not leave the search box that was last typed into: ipywidgets keeps it

    def saved():
        try: return lab[1].stat().st_mtime_ns != before and json.loads(lab[1].read_text())
        except ValueError: return False  # half written
    cells = [c for c in until(saved, "saved")["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    assert all(c["execution_count"] for c in cells) and not [o for o in outputs if o["output_type"] == "error"]
    assert sum("data:image/webp" in "".join(o.get("data", {}).get("text/html", "")) for o in outputs) >= 4
    assert parts.count() >= 4 and parts.locator("visible=true").count() == 0


# ---- without a kernel

@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("html")
    subprocess.run([BIN / "jupyter", "nbconvert", "--to", "html", "--embed-images", "--log-level", "ERROR", "--output-dir", directory, EXPLORE], check=True, capture_output=True)
    return directory / "40_explore.html"


def test_a_converted_notebook_shows_pictures_and_says_so(converted, browser, shots):
    page, _ = visit(browser, converted.as_uri(), offline=True)
    parts = page.locator("[class^=gcpo-static-]")
    assert parts.count() >= 4
    for part in parts.all():
        assert part.is_visible() and "This is a static picture: no kernel is alive." in part.text_content()
    pictures = page.locator("[class^=gcpo-static-] img").all()
    assert len(pictures) >= 4 and all(p.evaluate("e => e.complete && e.naturalWidth > 500") for p in pictures)
    assert page.get_by_text("Error displaying widget").count() == 0 and all(p.evaluate("e => e.complete && e.naturalWidth > 0") for p in page.locator("img").all())
    parts.first.screenshot(path=shots / "static_group.png")
    page.context.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    from gcpo.explore import explore_scm, report
    directory = tmp_path_factory.mktemp("reports")
    return {"group": report("figure-1", directory / "group.html"), "collider": report(explore_scm(know_yn=True), directory / "collider.html")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_opens_with_the_network_cut(reports, browser, shots, scheme):
    from gcpo.record import load_group
    from gcpo.views import THEMES, contrast, weights_table
    page, asked = visit(browser, reports["group"].as_uri(), offline=True, scheme=scheme)
    figure = page.locator("svg.main-svg").first
    figure.wait_for(state="visible")
    assert page.locator("svg.main-svg .barlayer .trace").count() == 3 and page.locator("svg.main-svg .heatmaplayer image, svg.main-svg .heatmaplayer rect").count() >= 4
    assert numbers(page, "B") == [f"{b:.3f}" for b in weights_table(load_group("figure-1")).B]
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    colour = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    assert [int(n) for n in re.findall(r"\d+", colour)] == [int(THEMES[scheme].paper[k:k + 2], 16) for k in (1, 3, 5)]
    chips = page.locator(".gcpo-token").evaluate_all("all => all.map(e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color])")
    chips = [["#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", colour)[:3]) for colour in chip] for chip in chips]
    assert len(chips) > 100 and min(contrast(*chip) for chip in chips) >= 4.5 and max(contrast(paper, THEMES[scheme].paper) for paper, _ in chips) < 4
    assert page.get_by_role("button", name="Share").count() == 0
    page.screenshot(path=shots / f"report_group_{scheme}.png", full_page=True)
    page.context.close()


def test_a_report_follows_the_preferred_theme(reports, browser, shots):
    page, _ = visit(browser, reports["collider"].as_uri(), offline=True)
    paper = lambda: page.locator("svg.main-svg").first.evaluate("e => getComputedStyle(e).backgroundColor")
    page.locator("svg.main-svg .scatterlayer .trace").first.wait_for(state="attached")
    light = paper()
    page.emulate_media(color_scheme="dark")
    until(lambda: paper() != light, "the figure is redrawn in dark")
    page.screenshot(path=shots / "report_collider_dark.png", full_page=True)
    page.context.close()


def test_two_themes_on_one_page_leave_each_other_alone(browser, shots, tmp_path):
    from gcpo.explore import explore_tokens
    from gcpo.views import THEMES
    (tmp_path / "both.html").write_text("<!doctype html><meta charset='utf-8'>" + "".join(explore_tokens("tiny", theme=theme).static(draw=False)[0] for theme in THEMES))
    page, _ = visit(browser, (tmp_path / "both.html").as_uri(), offline=True)
    for name, theme in THEMES.items():
        for part in (f".gcpo-{name}", f".gcpo-{name} .gcpo-token[data-value='0.0000']"):
            colour = page.locator(part).first.evaluate("e => getComputedStyle(e).backgroundColor")
            assert [int(n) for n in re.findall(r"\d+", colour)] == [int(theme.paper[k:k + 2], 16) for k in (1, 3, 5)]
    page.screenshot(path=shots / "both_themes.png")
    page.context.close()
