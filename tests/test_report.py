"""Reports of real sweeps with trainings and evaluations, moved and half finished ones; what is odd in a directory is told; the notebook, and a card that says what it must."""
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import BIN, ROOT, SMALL

import gcpo.report as r
from gcpo.batch import Options, expand, job_of, open_batch, run_batch
from gcpo.core import cell
from gcpo.evaluate import Evaluation, compare_evaluations, evaluate, read_results, scores_of
from gcpo.train import Config, train

SHORT = {**{k: v for k, v in SMALL.items() if k not in ("beta", "num_iterations")}, "max_steps": 2, "eval_steps": 2, "save_steps": 2, "eval_size": 10, "prompts_per_step": 2, "train_size": 100}
SWEEP = dict(notebook="train", parameters={k: v for k, v in SHORT.items()}, cases={"One": {"data": "largest_of_three"}, "Two": {"data": "addition"}}, grid={"method": ["grpo", "gcpo"]}, seeds=[0, 1],
             evaluate=dict(benchmarks=["addition", "largest_of_three"], max_problems=12, num_samples=2, max_completion_length=6, device="cpu"))


def laid_out(directory, **changes):
    "A sweep's directory as gcpo-batch makes it, nothing done yet."
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.parent / f"{directory.name}.yaml"
    file.write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
    return open_batch(expand(file), directory)


def done(batch, run):
    "A run done without its kernel."
    values = job_of(batch, run)["parameters"]
    evaluate(Evaluation.checked(values)) if run.notebook == "evaluate" else train(Config.checked(values))
    (batch.directory / run.id / "outcome.json").write_text(json.dumps(dict(state="finished", seconds=1.0)))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    batch = laid_out(tmp_path_factory.mktemp("swept") / "table1-rehearsal")
    for run in batch.sweep.runs:
        done(batch, run)
    return batch


def own(batch, method, case, kind="train"):
    return [batch.directory / run.id for run in batch.sweep.runs if run.notebook == kind and run.varied.get("method") == method and run.case == case]


def test_a_sweep_of_two_base_models(swept):
    runs = r.collect(swept.directory)
    assert (runs.state == "finished").all() and len(runs) == len(swept.sweep.runs) and r.varied(runs) == ["method"]
    cells = r.scores(runs)
    assert [*dict.fromkeys(cells.block)] == ["One (tiny)", "Two (tiny)"] and [*dict.fromkeys(cells.label)] == ["base", "grpo", "gcpo"] and len(cells) == 2 * 3 * 2
    for c in cells.itertuples():
        judged = own(swept, c.label, c.block[:3], "evaluate")
        if c.label != "base":
            assert np.array_equal(c.array, scores_of(judged, c.benchmark)) and (c.seeds, c.planned, c.samples) == (2, 2, 2)
            assert c.score == pytest.approx(np.mean([read_results(d).table.score[c.benchmark] for d in judged]))
        else:
            assert (c.seeds, c.planned, c.samples) == (1, 1, 4), "evaluations of the untrained model by several sampling seeds are more samples, not more seeds"
    differences = r.table_differences(cells)
    theirs = compare_evaluations({m: own(swept, m, "Two", "evaluate") for m in ("grpo", "gcpo")}, "grpo", "addition").loc["gcpo"]
    mine = differences[(differences.block == "Two (tiny)") & (differences.benchmark == "addition") & (differences.row == "gcpo")].iloc[0]
    assert [mine.difference, mine.low, mine.high, mine.p_value] == theirs[["difference", "low", "high", "p_value"]].tolist()
    assert mine.p_holm >= mine.p_value and len(differences) == 2 * 2 * 2 and differences.p_holm.max() <= 1
    part, = r.sections(runs)
    assert part.title == "Table 1: methods and benchmarks, rehearsal" and "8 of 8 trainings finished; 10 of 10 evaluations finished." in part.told[0]
    assert all(not math.isnan(x) for x in r.table_budgets(runs)["tokens of evaluation"]) and len(part.figures["Scores"].data) == 6
    gap = r.figure_scores(cells[(cells.block != "One (tiny)") | (cells.label != "gcpo")])
    assert sorted(t.name for t in gap.data if t.showlegend) == ["base", "gcpo", "grpo"] and len(gap.data) == 5, "a row that the first panel lacks has its name still"


def test_the_report_is_made_from_files_alone(swept, tmp_path):
    there = tmp_path / "a" / "table1-rehearsal"
    shutil.copytree(swept.directory, there)
    first = r.report(r.collect(there), tmp_path / "first.html").read_text()
    shutil.copytree(there, tmp_path / "b" / "table1-rehearsal")
    shutil.rmtree(tmp_path / "a")
    assert r.report(r.collect(tmp_path / "b" / "table1-rehearsal"), tmp_path / "second.html").read_text() == first
    markup = re.sub(r"<script.*?</script>", "", first, flags=re.S)
    assert str(tmp_path) not in first and len(first.encode()) < 6e6 and first.count("<script") == 1 + markup.count("plotly-graph-div") and not re.search(r"(src|href)=.(?!#)", markup)


def test_what_is_missing_is_counted(swept, tmp_path):
    place = tmp_path / "half"
    shutil.copytree(swept.directory, place)
    judged, trained, waiting = own(swept, "grpo", "One", "evaluate")[1], own(swept, "gcpo", "Two")[0], own(swept, "gcpo", "One")
    (place / judged.name / "outcome.json").write_text(json.dumps(dict(state="failed", error=["ValueError: no '/srv/secret/x.json'"])))
    shutil.rmtree(place / trained.name)
    for d in [*waiting, *own(swept, "gcpo", "One", "evaluate")]:
        shutil.rmtree(place / d.name)
    runs = r.collect(place)
    cells = r.scores(runs).set_index(["block", "label", "benchmark"])
    assert cells.loc[("One (tiny)", "grpo", "addition"), ["seeds", "planned"]].tolist() == [1, 2] and cells.loc[("One (tiny)", "gcpo", "addition"), ["seeds", "planned"]].tolist() == [0, 2]
    part, = r.sections(runs)
    assert "5 of 8 trainings finished, 3 waiting; 7 of 10 evaluations finished, 1 failed, 2 waiting." in part.told[0]
    assert "(1 of 2 seeds)" in part.tables["Scores"].loc[("One (tiny)", "grpo"), "addition"] and part.tables["Scores"].loc[("One (tiny)", "gcpo"), "addition"] == "– (0 of 2 seeds)"
    assert len(part.tables["Not finished"]) == 6 and "/srv/secret" not in r.page("x", [part]) and "x.json" in r.page("x", [part])
    assert part.tables["Runs counted"].loc[("One (tiny)", "gcpo", "train"), "waiting"] == 2


def test_nothing_to_show_is_a_report_too(tmp_path):
    batch = laid_out(tmp_path / "new", evaluate={})
    runs = r.collect(batch.directory)
    text = r.report(runs, tmp_path / "report.html").read_text()
    assert "0 of 8 trainings finished, 8 waiting." in text and "There is nothing to compare" in text


def lone(directory, rewards, seed=0, finished=True, **config):
    "A directory with the files that a training leaves, made up here: `rewards` of its evaluations."
    directory.mkdir(parents=True)
    values = Config.checked({**SHORT, "seed": seed, **config}).model_dump(exclude={"output_dir"})
    (directory / "manifest.json").write_text(json.dumps(dict(config=values, environment={}, started="")))
    rows = [{"step": i, "optim/grad_norm": 1.0 + i + seed, "tokens/rollout": 10.0, "tokens/draws": 5.0 * (values["objective"] == "gcpo"), "time/update": 0.5} for i in range(2)]
    rows[0] |= {"eval/reward": rewards[0], "eval/low": rewards[0] - .1, "eval/high": rewards[0] + .1, "eval/count": 20.0}
    rows += [{"step": 2, "eval/reward": rewards[1], "eval/low": rewards[1] - .1, "eval/high": rewards[1] + .1, "eval/count": 20.0}] if finished else []
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_grid_of_numbers_becomes_a_line(tmp_path):
    for alpha, at in ((0.0, .3), (1.0, .4), (2.0, .6), (3.4, .5)):
        for seed in (0, 1, 2):
            lone(tmp_path / "alphas" / f"a{alpha}-s{seed}", (.3, at + seed / 50), seed, alpha=alpha)
    lone(tmp_path / "alphas" / "late", (.3, .9), 3, finished=False, alpha=3.4)
    runs = r.collect(tmp_path / "alphas")
    part, = r.sections(runs)
    assert r.varied(runs) == ["alpha"] and {*part.differences.against} == {"alpha=2"} and part.scores.label.tolist() == ["base", "alpha=0", "alpha=1", "alpha=2", "alpha=3.4"]
    line, base = part.figures["Scores"].data
    assert list(line.x) == [0, 1, 2, 3.4] and list(line.y) == pytest.approx([.32, .42, .62, .52]) and base.line.dash == "dot" and list(base.y) == pytest.approx([.3, .3])
    assert part.tables["Scores"].iloc[-1, 0].endswith("(3 of 4 seeds)") and "12 of 13 trainings finished, 1 interrupted" in part.told[0]
    zero = part.differences[part.differences.row == "alpha=0"].iloc[0]
    assert zero.difference == pytest.approx(-.3) and zero.high < 0 and zero.detectable == pytest.approx(.06, abs=.02), "sd of seeds 0.02: Welch with 4 degrees of freedom"
    assert r.section(runs, "x", baseline="3.4").differences.against.iloc[0] == "alpha=3.4"
    gradients = r.table_gradients(runs)
    assert gradients.loc[("tiny", "alpha=1"), "mean"].startswith("2.5 [") and gradients.loc[("tiny", "alpha=1"), "clipped"].startswith("83%")
    curve = r.through_training(runs, "optim/grad_norm").set_index(["label", "step"]).loc[("alpha=3.4", 1)]
    assert (curve["mean"], curve.low, curve.high, curve.runs) == (3.5, 2.0, 5.0, 4), "unfinished runs are drawn too"


def test_rows_by_other_parameters(tmp_path):
    for k, values in enumerate([dict(similarity="cosine"), dict(similarity="gaussian"), dict(similarity="gaussian", reference="mean")]):
        for seed in (0, 1):
            lone(tmp_path / f"{k}{seed}", (.3, .4 + seed / 10), seed, device=["", "cpu"][seed], **values)
    runs = r.collect(tmp_path)
    assert r.varied(runs) == ["similarity", "reference"] and r.scores(runs).label.tolist()[1:] == ["similarity=cosine, reference=ratio", "similarity=gaussian, reference=mean", "similarity=gaussian, reference=ratio"]
    with pytest.raises(ValueError, match="'.*' and '.*' are the same run"):
        r.scores(runs.assign(config=[{**c, "seed": 0} for c in runs.config]))
    alone = r.scores(runs[[c["seed"] == 0 for c in runs.config]])
    assert alone.note[1].startswith("one seed") and (alone.low[1], alone.high[1]) == pytest.approx((.3, .5))


def test_an_unequal_comparison_is_told(tmp_path):
    for method, rate in (("grpo", 1e-3), ("gcpo", 2e-3), ("dr_grpo", 1e-3)):
        lone(tmp_path / method, (.3, .4), method=method, learning_rate=rate, beta=0.0 if method == "dr_grpo" else 0.04)
    part, = r.sections(r.collect(tmp_path))
    assert part.tables["Also different"].set_index("parameter").loc[["learning_rate", "beta"], ["grpo", "dr_grpo", "gcpo"]].values.tolist() == [["0.001", "0.001", "0.002"], ["0.04", "0", "0.04"]]
    assert any("also differ" in line for line in part.told)
    budgets = r.table_budgets(r.collect(tmp_path))
    assert budgets.loc[("tiny", "gcpo"), ["tokens", "seconds", "times"]].tolist() == [30, 1, 1.5] and budgets.times["tiny", "grpo"] == 1


def test_evaluations_that_do_not_fit_together(swept, tmp_path):
    model = str(own(swept, "grpo", "Two")[0] / "policy")
    other, common = str(own(swept, "grpo", "Two")[1] / "policy"), dict(benchmarks=["addition"], max_problems=6, num_samples=2, max_completion_length=6, device="cpu")
    for name, values in {"a": dict(model=model), "b": dict(model=other), "again": dict(model=model, seed=1), "cool": dict(model=model, temperature=0.3)}.items():
        evaluate(Evaluation.checked({**common, **values, "output_dir": str(tmp_path / "judged" / name)}))
    runs = r.collect(swept.directory, tmp_path / "judged")
    late = runs[runs.directory.map(lambda d: d.parent.name == "judged")]
    assert len({*late.of}) == 2 and {*late.sweep} == {"table1-rehearsal"}
    only = runs[(runs.kind == "train") | runs.index.isin(late.index)]
    keys = r.varied(only)
    assert keys == ["method", "evaluation.temperature"]
    cells = r.scores(only, keys).set_index("label")
    assert cells.loc["grpo, temperature=0.6", ["seeds", "samples"]].tolist() == [2, 2] and "1 evaluations more" in cells.loc["grpo, temperature=0.6", "note"] and cells.loc["grpo, temperature=0.3", "seeds"] == 1
    with pytest.raises(ValueError, match="6 problems of 'addition'.* same problems asked as often"):
        r.scores(runs, ["method"])
    shutil.rmtree(tmp_path / "judged" / "a" / "records")
    assert r.collect(tmp_path / "judged").state.tolist() == ["interrupted", "finished", "finished", "finished"]


def test_overlap_and_ungraded_answers_are_told(swept, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(swept.directory, place)
    judged = place / own(swept, "gcpo", "Two", "evaluate")[0].name
    (judged / "overlap.json").write_text(json.dumps({"addition": [{"test_id": "1"}, {"test_id": "2"}], "largest_of_three": []}))
    part = next((judged / "records" / "addition").glob("*.parquet"))
    table = pd.read_parquet(part)
    table.assign(score=[math.nan, *table.score[1:]]).to_parquet(part)
    note = r.scores(r.collect(place)).set_index(["block", "label", "benchmark"]).note[("Two (tiny)", "gcpo", "addition")]
    assert note == "trained on up to 2 of the problems; 1 samples ungraded, counted wrong"
    assert note in r.page("x", r.sections(r.collect(place)))


def test_names_cannot_break_the_page(tmp_path):
    lone(tmp_path / "<script>alert(1)</script>" / "one", (.3, .4), data="addition")
    runs = r.collect(tmp_path / "<script>alert(1)</script>")
    text = r.report(runs, tmp_path / "r.html", "</title><script>alert(2)</script>").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(2)" in text


def test_the_notebook_runs_on_a_sweep(swept, tmp_path):
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump(dict(runs=[str(swept.directory)], output_dir=str(tmp_path / "out"), title="A sweep", baseline="gcpo", tables=["csv", "latex"])))
    ran = subprocess.run([BIN / "papermill", ROOT / "nbs" / "52_report.ipynb", tmp_path / "out.ipynb", "-f", tmp_path / "parameters.yaml", "--no-progress-bar"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "differences to gcpo" in (tmp_path / "out" / "report.html").read_text() and (tmp_path / "out" / "tables" / "table1-rehearsal-scores.tex").exists()
    shown = (tmp_path / "out.ipynb").read_text()
    assert "differences to gcpo" in shown and "application/vnd.plotly" in shown and len(shown) < 3e6


def test_its_parameters_cell_is_the_configuration():
    source, = ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / "52_report.ipynb").read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert source == cell(r.Report)


def test_a_card_tells_data_seed_results_and_limits(swept):
    run_dir, judged = own(swept, "gcpo", "Two")[1], own(swept, "gcpo", "Two", "evaluate")[1]
    card = r.model_card(run_dir, [judged], "me/mine")
    table = read_results(judged).table
    for word in ("`addition`", "Seed 1.", "luck of training", "gcpo", "library_name: transformers", f"| addition | {100 * table.score['addition']:.1f} | [{100 * table.low['addition']:.1f}, {100 * table.high['addition']:.1f}]", "12 x 2", "torch"):
        assert word in card, word
    assert not re.search(r"(?<![\w.:/])/(?:root|home|tmp|work|mnt|Users)/", card) and "hf_" not in card
    coin = r._card_limits({**Config().model_dump(), "random_reward": True}, {"environment": {}}, r.card_results(run_dir))
    assert "coin flips" in coin and "Not evaluated" in coin
    with pytest.raises(ValueError, match="but of"):
        r.model_card(run_dir, [own(swept, "grpo", "Two", "evaluate")[0]])


def test_whole_models_go_out_without_paths(swept):
    class Hub:
        def create_repo(self, repo, private, exist_ok): return f"https://huggingface.co/{repo}"
        def repo_info(self, repo): return type("Info", (), dict(private=True))
        def upload_folder(self, repo_id, folder_path, commit_message): self.sent = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}
    hub, run_dir = Hub(), own(swept, "gcpo", "Two")[0]
    (run_dir / "policy" / "notes.log").write_text("secret")
    assert r.push_to_hub(run_dir, "me/mine", api=hub).endswith("me/mine") and {"README.md", "config.json", "model.safetensors"} <= {*hub.sent} and "notes.log" not in hub.sent
    assert not any(str(swept.directory).encode() in text or str(ROOT).encode() in text for text in hub.sent.values())


@pytest.mark.slow
def test_a_rehearsal_from_its_file_to_its_figure(tmp_path):
    sweep = expand(ROOT / "nbs" / "params" / "rehearsal" / "figure3d.yaml")
    table = run_batch(sweep, tmp_path / "figure3d-rehearsal", "local", Options(workers=2))
    assert (table.state == "finished").all(), table.told.tolist()
    part, = r.sections(r.collect(tmp_path / "figure3d-rehearsal"))
    assert part.title == "Figure 3d: similarities, rehearsal" and [*dict.fromkeys(part.scores.label)] == ["base", "similarity=cosine", "similarity=euclidean", "similarity=gaussian"]
