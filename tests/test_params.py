"""The runs of the paper as files: every file expands, holds what the paper states, says how many runs it has, can be estimated without a GPU, and has a rehearsal with the same runs."""
import json
import os
import re
import time
from html import escape

import pytest
from conftest import ROOT

import gcpo.batch as b
import gcpo.cost
import gcpo.policy
from gcpo.report import collect, report, sections

PARAMS = ROOT / "nbs" / "params"
SWEEPS = ["table1", "table2", "figure3a", "figure3b", "figure3c", "figure3d", "gradient_norm"]
MATHEMATICS = ["aime24", "aime25", "amc23", "math500", "minerva_math"]
AIME, NUMINA = "aime_1983_2023", "numina_4000"
SHAPES = {"1.5B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2), "7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4)}


def trainings(name):
    return [r for r in b.expand(PARAMS / f"{name}.yaml", here=False).runs if r.notebook == "train"]


@pytest.mark.parametrize("name", [*SWEEPS, *(f"rehearsal/{s}" for s in SWEEPS), *(f"study/{s}" for s in ("methods", "grids", "smollm2"))])
def test_a_file_expands_and_says_how_many_runs_it_has(name):
    sweep = b.expand(PARAMS / f"{name}.yaml", here="/" in name)
    train, after, base = (sum((r.notebook, bool(r.after)) == kind for r in sweep.runs) for kind in (("train", False), ("evaluate", True), ("evaluate", False)))
    head = " ".join(line for line in (PARAMS / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    assert after in (0, train) and f"{train} trainings, each evaluated; {base} evaluation{'s' * (base > 1)} of" in head if after else f"{train} trainings; nothing is evaluated" in head
    for run in sweep.runs:
        assert run.kind.parameters.checked(run.config) and run.hash == b.run_hash(run.config, run.kind.free, next((t.hash for t in sweep.runs if t.id == run.after), ""))
    assert sweep.name == (f"{name.split('/')[1]}-rehearsal" if name.startswith("rehearsal") else name.split("/")[-1])


def test_what_the_paper_states():
    for name in SWEEPS:
        for c in (r.config for r in trainings(name)):
            searching, grid = c["objective"] == "rest_mcts", {"figure3b": "alpha", "figure3c": "kappa"}.get(name)
            assert c["weight_decay"] == 0.01 and c["prompts_per_step"] * c["num_generations"] == 256 and c["num_draws"] == c["num_continuations"] == c["num_generations"]
            assert (c["learning_rate"] == 1e-6) != searching and (c["lora_r"] == 0) != searching and (c["max_completion_length"] == 16384) != (name == "figure3a")
            assert (grid == "alpha" or c["alpha"] == 2) and (grid == "kappa" or c["kappa"] == (0 if c["method"] in ("gcpo_no_kl", "grpo_scaled") else 0.06))
            assert c["beta"] == dict(gvpo=0.1, dr_grpo=0.0).get(c["method"], 0.001)


def test_cases_and_grids_are_the_papers():
    cases = lambda name: {(r.case, r.config["model"].split("/")[1], r.config["data"]) for r in trainings(name)}
    values = lambda name, parameter: list(dict.fromkeys(r.config[parameter] for r in trainings(name)))
    deepscaler = ("DeepScaleR-1.5B-Preview",) * 2
    assert cases("table1") == {(*deepscaler, AIME), *((f"DeepSeek-R1-Distill-Qwen-{size}",) * 2 + (NUMINA,) for size in ("1.5B", "7B"))} and cases("table2") == {(*deepscaler, AIME)}
    assert values("table1", "method") == ["grpo", "rest_mcts", "gvpo", "dr_grpo", "gcpo", "gcpo_paper"] and {"gcpo", "gcpo_no_weighting", "gcpo_no_kl"} < {*values("table2", "method")}
    assert {m for m, *_ in cases("figure3a")} == {"Qwen2-7B-Instruct"} and values("gradient_norm", "method") == ["grpo", "gcpo"]
    assert values("figure3b", "alpha") == [0, 0.5, 1, 1.4, 1.8, 2, 2.4, 2.8, 3, 3.4] and values("figure3d", "similarity") == ["cosine", "euclidean", "gaussian"]
    assert {0.02, 0.04, 0.06, 0.08} < {*values("figure3c", "kappa")} and {*values("figure3c", "kappa")} >= {0.05, 0.07}
    judged = {name: {json.dumps(r.config["benchmarks"]) for r in b.expand(PARAMS / f"{name}.yaml", here=False).runs if r.notebook == "evaluate"} for name in SWEEPS}
    assert judged == {**dict.fromkeys(SWEEPS, {json.dumps(MATHEMATICS)}), "figure3a": {json.dumps(["humaneval", "humaneval_5shot"])}, "gradient_norm": set()}


def test_the_published_rows_are_there():
    from gcpo.statistics import published
    runs = {(r.case, r.config["method"].replace("_", "-")) for name in ("table1", "table2") for r in trainings(name)}
    assert {(model, method) for model, method in published("all").index if method != "base"} <= runs


@pytest.mark.parametrize("name", ["paper", *SWEEPS])
def test_every_value_is_marked(name):
    of_methods = re.compile(r"Eq\.|own paper")
    for number, line in enumerate((PARAMS / f"{name}.yaml").read_text().splitlines(), 1):
        value, _, told = line.partition("#")
        if value.strip() and not re.fullmatch(r"(base|notebook): .*|[\w. -]+:", value.strip()):
            same_as_above = "DeepSeek-R1-Distill-Qwen-7B" in value
            assert re.match(r"\s*(paper|ours)\b", told) or of_methods.search(told) or same_as_above, f"{name}.yaml:{number} does not say whose value it is"


@pytest.mark.parametrize("name", SWEEPS)
def test_a_rehearsal_has_the_runs_that_it_rehearses(name):
    named = lambda file: {(r.case, *((k, v) for k, v in sorted(r.varied.items()) if k in grid)) for r in trainings(file)}
    grid = b.read_sweep(PARAMS / f"{name}.yaml")[0].grid
    assert grid and named(name) == named(f"rehearsal/{name}")
    assert {r.config["model"] for r in trainings(f"rehearsal/{name}")} == {"tiny"}


@pytest.fixture
def without_a_hub(tmp_path, monkeypatch):
    "The paper's models as configurations of their shapes, its training sets as sums."
    from transformers import AutoTokenizer, Qwen2Config
    real = gcpo.policy.locate
    tokenizer = AutoTokenizer.from_pretrained(real("tiny"))
    for size, shape in SHAPES.items():
        Qwen2Config(num_hidden_layers=28, vocab_size=152064, max_position_embeddings=131072, tie_word_embeddings=False, **shape).save_pretrained(tmp_path / size)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
        tokenizer.save_pretrained(tmp_path / size)
    for module in (b, gcpo.cost, gcpo.policy):
        monkeypatch.setattr(module, "locate", lambda name: str(tmp_path / ("7B" if "7B" in name else "1.5B")) if name.count("/") == 1 else real(name))
    for file, size in dict(aime_1983_2023=919, numina_4000=4000, gsm8k=1319).items():
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(dict(id=f"{file}{i}", problem=f"{file} {i}", answer=str(i))) + "\n" for i in range(size)))
    monkeypatch.setenv("GCPO_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path


def short(tmp_path, name):
    "A sweep of the paper with completions that are estimated in seconds."
    (tmp_path / "short.yaml").write_text("parameters: {max_completion_length: 64, max_draw_length: 16, max_continuation_length: 16, num_draws: 3, num_continuations: 2}\n")
    (tmp_path / f"{name}.yaml").write_text(f"base: [{PARAMS}/{name}.yaml, short.yaml]\n")
    return tmp_path / f"{name}.yaml"


@pytest.mark.parametrize("name", ["figure3a", pytest.param("table1", marks=pytest.mark.slow)])
def test_a_sweep_of_the_paper_is_checked_whole_and_estimated(name, without_a_hub, capsys):
    sweep = b.expand(short(without_a_hub, name))
    b.run_batch(sweep, without_a_hub / "sweep", "dry")
    said = capsys.readouterr().out
    counts = f"{len(sweep.runs)} runs of {len(sweep.runs)} to do ({sum(r.notebook == 'evaluate' for r in sweep.runs)} evaluate, {sum(r.notebook == 'train' for r in sweep.runs)} train): at most "
    assert counts in said and not (without_a_hub / "sweep").exists()
    searches = sum(r.config.get("objective") == "rest_mcts" for r in sweep.runs)
    assert re.findall(r"(\d+) runs are not estimated: (.{8})", said) == ([(str(searches), "a search")] if searches else [])
    table = b.batch_cost(sweep.runs)
    by_method = lambda m, case: table.PFLOP[[r.id for r in sweep.runs if r.notebook == "train" and r.config["method"] == m and r.case == case]].iloc[0]
    for case in {r.case for r in sweep.runs if r.case}:
        assert by_method("gcpo", case) > 2 * by_method("grpo", case)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_rehearsal_is_estimated(name, tmp_path, capsys):
    sweep = b.expand(PARAMS / "rehearsal" / f"{name}.yaml")
    b.run_batch(sweep, tmp_path / "sweep", "dry")
    said = capsys.readouterr().out
    assert f"{len(sweep.runs)} runs of {len(sweep.runs)} to do" in said and all("a search" in told for told in re.findall("not estimated: .*", said))


@pytest.mark.slow
def test_all_rehearsals_in_half_an_hour(tmp_path):
    began = time.perf_counter()
    for name in SWEEPS:
        table = b.run_batch(b.expand(PARAMS / "rehearsal" / f"{name}.yaml"), tmp_path / name, options=b.Options(workers=2, threads=1))
        assert (table.state == "finished").all(), table[table.state != "finished"]
        policies = b.collect(tmp_path / name)
        trained = policies[[bool(base) for base in policies.base]] if "base" in policies else policies
        assert trained["optim/grad_norm" if name == "gradient_norm" else "largest_of_three/score"].notna().all()
    sweeps = collect(*(tmp_path / name for name in SWEEPS))
    told = report(sweeps, tmp_path / "report.html").read_text()
    for name, part in zip(SWEEPS, sections(sweeps), strict=True):
        assert part.name == f"{name}-rehearsal" and escape(part.title) in told
        assert [*part.tables][:5] == ["Scores", "Differences", "Gradient norm", "Budgets of a run", "Runs counted"] and all(map(len, part.tables.values()))
        assert [*part.figures] == ["Scores", "Differences", "eval/reward", "optim/grad_norm"] and all(figure.data for figure in part.figures.values())
    print(f"\nall rehearsals: {(time.perf_counter() - began) / 60:.1f} min at a load of {os.getloadavg()[2]:.1f}")
    assert time.perf_counter() - began < 30 * 60
