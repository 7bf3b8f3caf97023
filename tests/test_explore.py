"""Exploring, across modules: what is shown is what trains, exports need no network, hostile groups do no harm, a run is followed while another process writes it."""
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import nbformat
import plotly.graph_objects as go
import pytest
import torch
from conftest import BIN, ROOT

from gcpo.core import Group, Query
from gcpo.explore import LiveExplorer, _page, compare_runs, explore_group, explore_live, explore_run, explore_scm, explore_tokens, report
from gcpo.kl import phi_tokenwise
from gcpo.policy import load_policy, reference_of
from gcpo.record import Record, load_group, recorded_groups, save_group
from gcpo.runs import run_table
from gcpo.train import Config, Optimiser, prepare, questions_of_step, train, train_step
from gcpo.views import THEMES, group_figure, style, token_table, weights_table

HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "javascript:alert(3)", "\\boxed{<b>4", "☃ \x00 \u202e {} %s {{x}}", "&amp;&lt;5"]


def synthetic(n=16, D=4096, J=4, m=2, T=64, texts=("12",)) -> Group:
    "A group of random states and log-probs."
    r = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=r)
    query = Query("synthetic", "How many?", torch.tensor([1]), torch.tensor([2]))
    return Group(query, (torch.arange(T),) * n, tuple(texts[i % len(texts)] for i in range(n)), torch.zeros(n, dtype=torch.bool), reward_G=torch.arange(n) % 2.0, z_G_D=normal(n, D), Z_G_J_M_D=normal(n, J, m, D),
                 old_logp_G_T=-normal(n, T).abs(), context_logp_G_J_T=-normal(n, J, T).abs(), influence_G=normal(n))


class Tags(HTMLParser):
    "Start tags with their attributes, and the text outside scripts and styles."
    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text.append(data)


# what is shown is what trains

@pytest.mark.parametrize("change, shown", [
    (dict(), dict()), (dict(similarity="cosine", alpha=1.4), dict(similarity="cosine", alpha=1.4)), (dict(weight="centroid"), dict(rule="centroid")),
    (dict(weight="influence", num_substitutes=4), dict(rule="influence")), (dict(weighting="sign_aware", similarity="euclidean"), dict(weighting="sign_aware", similarity="euclidean")),
    (dict(collider="paper", num_draws=3), dict()), (dict(weight="constant", weighting="clipped"), dict(rule="constant", weighting="clipped")),
], ids=str)
def test_what_is_shown_is_what_trains(change, shown, small):
    config = Config.checked({**small, **change})
    recipe, policy, queries, _ = prepare(config)
    groups, _ = train_step(policy, reference_of(policy), [queries[i] for i in questions_of_step(len(queries), 3, 0, 0)], recipe, Optimiser(policy, config), 0)
    live = [g for g in groups if len(g.draws_G_J)]
    assert live
    for g in live:
        record = Record(g, about={"draw": config.collider})
        table = weights_table(record, **shown)
        torch.testing.assert_close(torch.tensor(table.B.values).float(), g.weight_G, atol=1e-6, rtol=1e-5)
        assert list(group_figure(record, **shown).data[2].y) == table.B.tolist()
        tokens = token_table(Record(g, tokens_G=tuple(("t",) * len(ids) for ids in g.ids_G), about=record.about), 0)
        among = g.context_logp_G_J_T[:1, :, :len(tokens)] if config.collider == "paper" else g.context_logp_G_J_T[:1, 1:, :len(tokens)]
        torch.testing.assert_close(torch.tensor(tokens.phi.values).float(), phi_tokenwise(among)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(tokens.ref_ratio.values).float(), g.causal_ref_logp_G_T[0, :len(g.ids_G[0])], atol=1e-5, rtol=1e-5)


def test_a_plain_group_of_a_step_can_be_explored(small):
    recipe, policy, queries, _ = prepare(config := Config.checked(small))
    groups, _ = train_step(policy, reference_of(policy), [queries[i] for i in questions_of_step(len(queries), 3, 0, 0)], recipe, Optimiser(policy, config), 0)
    for g in groups:
        app = explore_group(g)
        dull = not len(g.draws_G_J)
        assert bool(app.message.value) == dull and (not dull or "computes it" in app.message.value)


# exports

def test_exports_ask_the_network_for_nothing(small, tmp_path):
    run = train(Config.checked({**small, "num_iterations": 1}))
    for k, what in enumerate([*recorded_groups(), run, [run, run], explore_scm(), explore_tokens("figure-1", 2), explore_group(synthetic(D=64, texts=HOSTILE))]):
        page = report(what, tmp_path / f"{k}.html").read_text()
        found = Tags(page)
        assert len(page.encode()) < 6_000_000 and page.count("*/Plotly") < 2
        for tag, attrs in found.tags:
            assert tag not in ("link", "iframe", "object", "embed", "base", "meta") or attrs.keys() <= {"charset"}, (tag, attrs)
            assert not attrs.keys() & {"src", "href", "onerror", "onload"}, (tag, attrs)
        assert "@import" not in page.split("</head>")[0] and "url(" not in page.split("</head>")[0]


def test_a_report_holds_the_numbers(tmp_path):
    app = explore_group("largest-of-three", alpha=1.3, selected=4)
    page, table = app.to_html(tmp_path / "x.html").read_text(), app.table()
    figures = json.loads(re.search(r"const FIGURES = (.*);\n", page).group(1).replace("<\\/", "</"))
    for theme, pair in zip(THEMES.values(), figures["figure-0"]):
        assert pair["data"][2]["y"] == table.B.tolist() and pair["layout"]["paper_bgcolor"] == theme.paper
    cells = re.findall(r'data-column="B">([^<]*)<', page)
    assert cells == [f"{b:.3f}" for b in table.B]


def test_a_saved_notebook_shows_the_picture(tmp_path):
    cells = ["from gcpo.explore import explore_group, load_group; explore_group(load_group('tiny'))", "from gcpo.explore import explore_scm; explore_scm()", "explore_group('no such group')"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "x.ipynb")
    run = lambda *args: subprocess.run([BIN / "jupyter", "nbconvert", "--log-level", "ERROR", *args, tmp_path / "x.ipynb"], check=True, capture_output=True, cwd=ROOT, timeout=300)
    run("--to", "notebook", "--execute", "--inplace", "--ExecutePreprocessor.store_widget_state=False")
    saved = nbformat.read(tmp_path / "x.ipynb", 4)
    assert "widgets" not in saved.metadata and (tmp_path / "x.ipynb").stat().st_size < 600_000
    for cell in saved.cells:
        still, alive = cell.outputs
        assert "no kernel is alive" in still.data["text/html"] and "application/vnd.jupyter.widget-view+json" in alive.data and alive.data["text/html"] == ""
        key, = set(re.findall(r"gcpo-live-(\w+)", still.data["text/html"]))
        assert f"gcpo-static-{key}" in still.data["text/html"]
    run("--to", "html")
    page = (tmp_path / "x.html").read_text()
    assert page.count("no kernel is alive") == 3 and "unknown recorded group" in page and "VBox" not in page and '<td data-column="B">' in page and "Theorem 1" in page


# hostile input

@pytest.mark.parametrize("theme", list(THEMES))
def test_texts_of_a_model_stay_texts(theme, tmp_path):
    group = replace(synthetic(n=6, D=16, texts=HOSTILE), query=Query("<svg onload=x>", HOSTILE[0], torch.tensor([1]), torch.tensor([2])))
    record = Record(group, tokens_G=tuple(tuple(HOSTILE) + ("x",) * 58 for _ in range(6)), texts={"y_n": HOSTILE[1]}, about={"draw": "loo", "model": HOSTILE[0]})
    app, tokens = explore_group(record, selected=1, theme=theme), explore_tokens(record, 1, theme=theme)
    assert app.message.value == tokens.message.value == ""
    for page in (app.static()[0], tokens.static()[0], report(record, tmp_path / "x.html").read_text()):
        found = Tags(page)
        assert not [t for t, a in found.tags if t in ("svg", "b") and a or t == "img" and not a.get("src", "").startswith("data:")] and not any("onerror" in a or "onload" in a for _, a in found.tags)
        assert sum(t == "script" for t, _ in found.tags) in (0, 2) and "alert(2)" in "".join(found.text)
    titled = Tags(_page(HOSTILE[0], [lambda name: go.Figure(layout_title_text=HOSTILE[0])]))
    assert sum(t == "script" for t, _ in titled.tags) == 2
    back = load_group(save_group(record, tmp_path / "hostile"))
    assert back.group.completions == group.completions and back.tokens_G == record.tokens_G and back.group.query.id == "<svg onload=x>"


@pytest.mark.parametrize("spoil, told", [
    (dict(z_G_D=lambda x: x * torch.nan), "4 of 4 responses without finite states"), (dict(Z_G_J_M_D=lambda x: x.where(torch.arange(4)[:, None, None, None] != 1, torch.inf)), "1 of 4 responses"),
    (dict(reward_G=lambda x: x * torch.nan), "4 of 4 responses not scored"), (dict(reward_G=lambda x: torch.full_like(x, torch.inf)), "infinite"), (dict(reward_G=lambda x: x[:3]), "reward_G has 3 entries for 4"),
    (dict(Z_G_J_M_D=lambda x: x[:, :1]), "J=1"), (dict(Z_G_J_M_D=lambda x: x[..., :5]), "shape"), (dict(z_G_D=lambda x: x[:0]), "gcpo.collider.encode"), (dict(reward_G=lambda x: x[:0]), "gcpo.reward.checked_rewards"),
], ids=lambda v: v if isinstance(v, str) else next(iter(v)))
def test_spoilt_groups_are_said_to_be_spoilt(spoil, told):
    group = synthetic(n=4, D=16)
    app = explore_group(replace(group, **{name: change(getattr(group, name)) for name, change in spoil.items()}))
    assert told in app.message.value and "Traceback" not in app.message.value
    assert app.static()[0].count(told)


def test_a_control_that_fails_says_so_and_recovers():
    app = explore_group(replace(synthetic(n=4, D=16), influence_G=torch.empty(0)))
    app.rule.value = "influence"
    assert "influence_G; gcpo.collider.dependence computes it" in app.message.value
    app.rule.value = "centroid"
    assert app.message.value == "" and list(app.figure.data[2].y) == weights_table(app.record, rule="centroid").B.tolist()


@pytest.mark.parametrize("n", [2, 3, 40])
def test_groups_of_any_size(n):
    app = explore_group(synthetic(n=n, D=8, J=2, m=1, T=3), selected=n - 1)
    app.similarity.value, app.alpha.value = "euclidean", 0.0
    assert app.message.value == "" and len(app.table()) == n and (app.table().B == 0).all()


def test_recorded_groups_are_data_and_small():
    for path in recorded_groups().values():
        raw = path.read_bytes()
        header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
        assert len(raw) < 1_000_000 and header.pop("__metadata__").keys() == {"gcpo"} and {v["dtype"] for v in header.values()} <= {"F16", "F32", "I32", "I64", "BOOL"}


# time

def test_kernel_time_from_slider_to_redraw(capsys):
    app, taken = explore_group(synthetic()), []
    for k in range(1, 31):
        begin = time.perf_counter()
        app.alpha.value = k / 10
        taken.append(time.perf_counter() - begin)
    with capsys.disabled():
        print(f" [slider to redraw, n=16, D=4096: median {1000 * statistics.median(taken):.0f} ms]", end="")
    assert statistics.median(taken) < 1 and app.table().upsilon.max() <= 3.0 and app.message.value == ""


# runs

def test_a_run_is_followed_while_another_process_writes_it(small, tmp_path):
    directory = tmp_path / "elsewhere"
    arguments = [f"--{k}={json.dumps(v) if isinstance(v, (list, bool)) else v}" for k, v in {**small, "output_dir": str(directory), "max_steps": 12, "num_iterations": 1}.items()]
    writer = subprocess.Popen([sys.executable, "-c", "from gcpo.train import main; main()", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    app, seen = explore_run(directory), set()
    assert "is it a run directory" in app.message.value
    deadline = time.monotonic() + 240
    while writer.poll() is None and time.monotonic() < deadline:
        app.safely(app.refresh)()
        assert not app.message.value or re.search("is it a run directory|no row yet", app.message.value), app.message.value
        if app.figure is not None:
            seen.add(len(run_table(directory)))
        time.sleep(.02)
    assert writer.wait(60) == 0, writer.stdout.read()[-2000:]
    app.refresh()
    assert app.message.value == "" and len(run_table(directory)) == 13 and len(seen) > 1 and app.step.options[-1] == ("11", 11)
    compared = compare_runs([directory, directory])
    assert "0 outside" in compared.differences.value and "+0.000" in compared.paired()


def test_a_torn_line_and_strange_runs(tmp_path):
    row = {"step": 0, "reward/mean": .5, "groups/mixed": .25, "eval/reward": float("nan"), "eval/low": float("nan"), "eval/high": float("nan"), "eval/count": 0}
    for name, text in {"torn": json.dumps(row) + "\n" + '{"step": 1, "rew', "nan": json.dumps(row) + "\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
        app = explore_run(tmp_path / name)
        assert app.message.value == "" and "no completions" in app.rows.value and len(run_table(tmp_path / name)) == 1
        assert "no evaluation yet" in compare_runs([tmp_path / name]).message.value
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "metrics.jsonl").write_bytes(b"\x80\x81\n")
    assert "are no text" in explore_run(tmp_path / "binary").message.value


# live

def test_stopping_leaves_the_policy_as_it_was():
    policy = load_policy("tiny", lora=4, device="cpu")
    torch.nn.init.normal_(next(p for name, p in policy.model.named_parameters() if "lora_B" in name))
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    app = explore_live(policy, "Numbers: 1 2 3\nLargest:", "3")
    assert isinstance(app, LiveExplorer)
    app.tokens.value, app.n.value = 4, 2
    app.go.click()
    app.halt.click()
    app.thread.join(120)
    assert app.stage.value.startswith("stopped before") and all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    app.go.click()
    app.thread.join(120)
    assert app.stage.value == "done" and app.message.value == "" and all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_a_chat_model_is_asked_in_its_own_form():
    from gcpo.explore import question_query
    policy = load_policy("tiny", device="cpu")
    policy.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    query = question_query(policy, " 1 + 1? ")
    assert query.prompt == [{"role": "user", "content": "1 + 1?"}] and policy.tokenizer.decode(query.ids) == "[user] 1 + 1? [assistant]"


# the package

def test_only_explore_imports_widgets():
    code = "import sys, gcpo.record, gcpo.views, gcpo.runs; print([m for m in ('plotly', 'ipywidgets', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_one_line_is_enough():
    code = "from gcpo.explore import explore_group, load_group; print(explore_group(load_group('figure-1')).table().B.round(3).tolist())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.strip()
    assert json.loads(shown) == weights_table(load_group("figure-1")).B.round(3).tolist()


def test_styles_stay_inside():
    for theme in THEMES.values():
        rules = re.findall(r"([^{}]+)\{[^}]*\}", style(theme).removeprefix("<style>").removesuffix("</style>"))
        assert rules and all(part.strip().startswith(".gcpo") for rule in rules for part in rule.split(","))
