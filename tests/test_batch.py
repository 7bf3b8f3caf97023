"""Sweeps as a whole: nothing done twice or lost when the batch, a worker or a kernel is killed, no process left, clear words when the disk is full, and Slurm where there is one."""
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, SMALL

import gcpo.batch as b
from gcpo.core import read_metrics
from gcpo.evaluate import read_results
from gcpo.train import Config, train

TOY = """
from pydantic import Field
import gcpo.batch as b
class Toy(b.Parameters):
    model: str = Field("tiny", description="is looked for")
    steps: int = Field(3, ge=0, description="to count")
    pause: float = Field(0.0, ge=0, description="seconds a step")
    work: int = Field(0, ge=0, description="additions a step")
    trainer: bool = Field(False, description="start a process that outlives the kernel if it can")
    bytes: int = Field(0, ge=0, description="written to a file")
    seed: int = Field(0, description="is added")
    output_dir: str = Field("", description="where")
b.NOTEBOOKS["toy"] = b.Kind({path!r}, Toy, ("policy",))
"""

BODY = """import json, os, pathlib, subprocess, time
place = pathlib.Path(output_dir)
with open(place / "starts", "a") as file: file.write(f"{os.getpid()}\\n")
if trainer: subprocess.Popen(["sleep", "300"], start_new_session=True)
rows = (place / "metrics.jsonl").read_text().splitlines() if (place / "metrics.jsonl").exists() else []
for step in range(len(rows), steps):
    time.sleep(pause)
    n = 0
    while n < work: n += 1
    with open(place / "metrics.jsonl", "a") as file: file.write(json.dumps({"step": step, "reward/mean": step + seed, "time/step": pause}) + chr(10))
if bytes: (place / "weights").write_bytes(b"0" * bytes)
(place / "policy").mkdir(exist_ok=True)"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A kind of run that counts; returns the line of Python that makes it known in another process."
    path, parameters = tmp_path / "toy.ipynb", nbformat.v4.new_code_cell("model, steps, pause, work, trainer, bytes, seed, output_dir = 'tiny', 3, 0.0, 0, False, 0, 0, ''", metadata=dict(tags=["parameters"]))
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(BODY)], metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), path)
    monkeypatch.setattr(b, "NOTEBOOKS", dict(b.NOTEBOOKS))
    source = TOY.format(path=str(path))
    exec(source, {"__name__": "toy"})
    return source


def write(path, **values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def command(toy, *arguments, **how):
    "gcpo-batch in a process of its own, which knows the toy."
    return subprocess.Popen([sys.executable, "-c", f"{toy}\nb.main()", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, **how)


def until(true, seconds=90.0):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.05)


def marked(directory):
    "Living processes that carry the mark of one of a sweep's runs."
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get(b.MARK, "").startswith(str(directory)) and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
        except psutil.Error:
            pass
    return found


def starts(directory):
    return Counter({p.parent.name: len(p.read_text().splitlines()) for p in directory.glob("*/starts")})


def counted_once(directory, steps):
    return all([r["step"] for r in read_metrics(p)] == list(range(steps)) for p in directory.glob("*/metrics.jsonl"))


def test_faults_are_told_together_with_their_lines(tmp_path):
    (tmp_path / "s.yaml").write_text("notebook: train\nparameters: {model: tiny, max_stps: 2}\ngrid:\n  alpha: [1, -1]\n  kapa: [0.1]\nseeds: [0]\n")
    with pytest.raises(ValueError) as told:
        b.expand(tmp_path / "s.yaml")
    lines = sorted(str(told.value).splitlines())
    assert len(lines) == 3 and lines[0].startswith(f"{tmp_path}/s.yaml:2: 'max_stps' is not a parameter; did you mean 'max_steps'?")
    assert ":4: alpha=-1: " in lines[1] and "alpha-1-kapa0.1-s0" in lines[1] and ":5: 'kapa' is not a parameter; did you mean 'kappa'?" in lines[2]


def test_equal_configurations_have_equal_names(tmp_path):
    hashes = [b.expand(write(tmp_path / "s.yaml", notebook="train", parameters=p)).runs[0].hash for p in ({"model": "tiny", "seed": 1}, {"seed": 1, "kappa": 0.06, "model": "tiny"}, {"model": "tiny", "seed": 2})]
    assert hashes[0] == hashes[1] != hashes[2]


def test_notebooks_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "gcpo" / "nbs").mkdir(parents=True)
    monkeypatch.setattr(b, "__file__", str(tmp_path / "gcpo" / "batch.py"))
    with pytest.raises(ValueError, match="there is no notebook"):
        b.notebook_path("50_train")
    (tmp_path / "gcpo" / "nbs" / "50_train.ipynb").touch()
    assert b.notebook_path("50_train") == tmp_path / "gcpo" / "nbs" / "50_train.ipynb"


def test_a_worker_does_not_load_the_project():
    assert "gcpo." not in b.worker_source().replace("gcpo-", "") and "import torch" not in b.worker_source()


def test_two_batches_on_one_directory_do_every_run_once(tmp_path, toy):
    file = write(tmp_path / "s.yaml", notebook="toy", parameters=dict(steps=4, pause=0.2), seeds=[0, 1, 2])
    other = command(toy, "run", file, "--dir", tmp_path / "sweep")
    until(lambda: list(tmp_path.glob("sweep/*/starts")))
    assert (b.run_batch(b.expand(file), tmp_path / "sweep").state == "finished").all(), "what the other has is waited for"
    assert "3 of 3 finished" in other.communicate(timeout=90)[0] and other.returncode == 0
    assert set(starts(tmp_path / "sweep").values()) == {1} and len(starts(tmp_path / "sweep")) == 3 and counted_once(tmp_path / "sweep", 4)


@pytest.mark.parametrize("victim", ["batch", "kernel", pytest.param("worker", marks=pytest.mark.slow)])
def test_kill_9(victim, tmp_path, toy):
    directory = tmp_path / "sweep"
    file = write(tmp_path / "s.yaml", notebook="toy", parameters=dict(trainer=True), cases=dict(short={"steps": 2}, long={"steps": 24, "pause": 0.25}))
    process = command(toy, "run", file, "--dir", directory)
    short, long = (r.id for r in b.expand(file).runs)
    until(lambda: (directory / long / "metrics.jsonl").exists() and len((directory / long / "metrics.jsonl").read_text().splitlines()) > 2)
    assert b.status(directory).state.to_dict() == {short: "finished", long: "running"}
    worker = b.holder(directory / long)["pid"]
    kernel, = [p for p in marked(directory / long) if "ipykernel" in " ".join(p.cmdline())]
    os.kill(dict(batch=process.pid, worker=worker, kernel=kernel.pid)[victim], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    until(lambda: not marked(directory) and not psutil.pid_exists(worker), 20)
    assert victim == "batch" or process.returncode == 1 and "1 of 2 finished, 1 interrupted" in said and "go on with: gcpo-batch run" in said
    assert b.status(directory).state.to_dict() == {short: "finished", long: "interrupted"}
    stamp, counted = (directory / short / "toy.ipynb").stat().st_mtime_ns, len(read_metrics(directory / long))
    assert counted < 24
    assert (b.run_batch(b.expand(file), directory).state == "finished").all()
    assert starts(directory) == {short: 1, long: 2} and [r["step"] for r in read_metrics(directory / long)] == list(range(24))
    assert (directory / short / "toy.ipynb").stat().st_mtime_ns == stamp and not marked(directory)


def test_ctrl_c_ends_everything_and_says_how_to_go_on(tmp_path, toy):
    file = write(tmp_path / "s.yaml", notebook="toy", parameters=dict(steps=400, pause=0.25, trainer=True), seeds=[0, 1, 2])
    process = command(toy, "run", file, "--dir", tmp_path / "sweep", "--workers", "2", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a test in the background inherits a SIGINT that is ignored
    until(lambda: len(list(tmp_path.glob("sweep/*/metrics.jsonl"))) == 2)
    assert len(marked(tmp_path / "sweep")) == 4, "two kernels and their trainers"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "0 of 3 finished, 2 interrupted, 1 waiting" in said and f"go on with: gcpo-batch run {file} --dir {tmp_path / 'sweep'} --executor local --workers 2" in said
    assert not marked(tmp_path / "sweep")


def test_disk_full(tmp_path, toy):
    file = write(tmp_path / "s.yaml", notebook="toy", cases=dict(small={}, large={"bytes": 200_000}, later={"steps": 4}))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    process = command(toy, "run", file, "--dir", tmp_path / "sweep", preexec_fn=limit)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 1 and "no space left for run large-" in said and "1 of 3 finished, 1 interrupted, 1 waiting" in said
    assert (b.run_batch(b.expand(file), tmp_path / "sweep").state == "finished").all()
    assert sorted(starts(tmp_path / "sweep").values()) == [1, 1, 2]


def test_a_sweep_that_grew_runs_only_what_is_new(tmp_path, toy):
    grown = lambda seeds: b.run_batch(b.expand(write(tmp_path / "s.yaml", notebook="toy", seeds=seeds)), tmp_path / "sweep")
    grown([0])
    assert (grown([0, 1]).state == "finished").all() and set(starts(tmp_path / "sweep").values()) == {1}
    with pytest.raises(ValueError, match="(?s)another sweep.*seed of toy: there 0, 1; asked 1, 2.*1 of its 2 runs are not asked for"):
        grown([1, 2])


def test_status_costs_little(tmp_path, toy):
    batch = b.open_batch(b.expand(write(tmp_path / "s.yaml", notebook="toy", seeds=list(range(200)))), tmp_path / "sweep")
    for run in batch.sweep.runs:
        (batch.directory / run.id).mkdir()
        (batch.directory / run.id / "lock").touch()
        (batch.directory / run.id / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "reward/mean": i, "time/step": 1.0}) + "\n" for i in range(2000)))
    assert (b.status(batch).reward == 1999).all() and (b.status(batch).state == "interrupted").all()
    assert min(_seconds(lambda: b.status(batch)) for _ in range(3)) < 1.0


def _seconds(act):
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def test_training_and_its_evaluation_by_papermill(tmp_path):
    file = write(tmp_path / "t.yaml", notebook="train", parameters={**SMALL, "max_steps": 2, "eval_size": 8}, cases={"gcpo": {}}, evaluate=dict(benchmarks=["largest_of_three"], max_problems=4, max_completion_length=6, device="cpu"))
    now = b.run_batch(b.expand(file), tmp_path / "sweep", options=b.Options(threads=1))
    base, trained, evaluated = now.index
    assert (now.state == "finished").all() and now.step.tolist() == [4, 2, 4] and now.held_out.notna().all()
    table = b.collect(tmp_path / "sweep")
    assert table.index.tolist() == [base, trained] and table.evaluated.tolist() == [base, evaluated] and table.base.tolist() == ["", base]
    assert table["largest_of_three/score"].tolist() == now.held_out[[base, evaluated]].tolist() and table["eval/reward"][trained] == now.held_out[trained] and table.case.tolist() == ["", "gcpo"]
    told = json.loads((tmp_path / "sweep" / evaluated / "manifest.json").read_text())
    assert told["config"]["model"] == str(tmp_path / "sweep" / trained / "policy") and told["weights"], "the trained policy was judged"
    assert read_results(tmp_path / "sweep" / evaluated).checked and not read_results(tmp_path / "sweep" / base).checked, "what the policy was trained on is known by its run"


JUDGE = """
class Judge(b.Parameters):
    model: str = Field("tiny", description="whose")
    benchmarks: list[str] = Field([], description="of nothing")
    problems: int = Field(20, description="to count")
    seed: int = Field(0, description="not used")
    output_dir: str = Field("", description="where")
b.NOTEBOOKS["judge"] = b.Kind({path!r}, Judge, ("records",))
b.NOTEBOOKS["toy"] = b.replace(b.NOTEBOOKS["toy"], judge="judge")
"""

JUDGING = """import os, pathlib, time
place = pathlib.Path(output_dir)
with open(place / "starts", "a") as file: file.write(f"{os.getpid()}\\n")
while (done := len((place / "counted").read_text()) if (place / "counted").exists() else 0) < problems:
    time.sleep(0 if model == "tiny" else 0.25)
    with open(place / "counted", "a") as file: file.write(".")
(place / "records").mkdir(exist_ok=True)"""


@pytest.fixture
def judged(toy, tmp_path):
    "The toy, and a notebook that judges what it leaves."
    path = tmp_path / "judge.ipynb"
    parameters = nbformat.v4.new_code_cell("model, benchmarks, problems, seed, output_dir = 'tiny', [], 20, 0, ''", metadata=dict(tags=["parameters"]))
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(JUDGING)], metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), path)
    source = toy + JUDGE.format(path=str(path))
    exec(source, {"__name__": "judged"})
    return source


@pytest.mark.parametrize("executor", ["local", pytest.param("inline", marks=pytest.mark.slow)])
def test_an_evaluation_killed_with_its_batch_goes_on_and_its_training_stays(executor, tmp_path, judged):
    file = write(tmp_path / "s.yaml", notebook="toy", parameters=dict(model="tiny", steps=2), evaluate=dict(benchmarks=["any"]))
    directory = tmp_path / "sweep"
    base, trained, evaluated = (r.id for r in b.expand(file).runs)
    process = command(judged, "run", file, "--dir", directory, "--executor", executor)
    until(lambda: (directory / evaluated / "counted").exists() and len((directory / evaluated / "counted").read_text()) > 2)
    assert b.status(directory).state.to_dict() == {base: "finished", trained: "finished", evaluated: "running"}
    process.kill()
    process.communicate(timeout=30)
    until(lambda: not marked(directory) and not b.holder(directory / evaluated), 20)
    assert b.status(directory).state.to_dict() == {base: "finished", trained: "finished", evaluated: "interrupted"}
    assert len((directory / evaluated / "counted").read_text()) < 20
    assert (b.run_batch(b.expand(file), directory, executor).state == "finished").all()
    assert starts(directory) == {base: 1, trained: 1, evaluated: 2} and (directory / evaluated / "counted").read_text() == "." * 20


def test_a_sweep_goes_on_with_another_number_of_processes(tmp_path):
    sweep = lambda **how: b.expand(write(tmp_path / "s.yaml", notebook="train", parameters={**SMALL, **how}))
    b.open_batch(sweep(), tmp_path / "sweep")
    assert b.join_batch(sweep(num_processes=2), tmp_path / "sweep").sweep.runs[0].config["num_processes"] == 2
    with pytest.raises(ValueError, match="alpha of train: there 2.0; asked 1.0"):
        b.join_batch(sweep(alpha=1.0, num_processes=2), tmp_path / "sweep")


def test_bad_places_and_names(tmp_path, toy):
    file, sealed = write(tmp_path / "s.yaml", notebook="toy", seeds=[0]), tmp_path / "file"
    sealed.write_text("not a directory")
    (tmp_path / "bad.yaml").write_text("notebook: toy\nparameters:\n  steps: [1\nseeds: [0]\n")
    for words, told in {(file, "--dir", sealed / "below"): f"error: cannot write to the directory '{sealed}/below'", (file, "--dir", tmp_path): "error: '.*' holds other files", (file, "--executor", "slrum"): "error: unknown executor 'slrum'; did you mean 'slurm'?",
                        (tmp_path / "bad.yaml", "--dir", tmp_path / "new"): f"error: {tmp_path}/bad.yaml:4: not YAML"}.items():
        with pytest.raises(SystemExit, match=told.replace("?", r"\?")):
            b.main(["run", *map(str, words)])
    assert sealed.read_text() == "not a directory" and not (tmp_path / "new").exists()


def without_times(run_dir):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run_dir)]


@pytest.mark.slow
def test_a_training_killed_with_its_batch_ends_as_if_it_had_not_been(tmp_path):
    file = write(tmp_path / "t.yaml", notebook="train", parameters={**SMALL, "max_steps": 30})
    directory, (run,) = tmp_path / "sweep", b.expand(file).runs
    process = command("import gcpo.batch as b", "run", file, "--dir", directory, "--threads", "1")
    until(lambda: list(directory.glob("*/checkpoints/step-*")), 240)
    process.kill()
    process.wait()
    until(lambda: not marked(directory) and b.holder(directory / run.id) is None, 20)
    assert b.status(directory).state.tolist() == ["interrupted"]
    assert b.run_batch(b.expand(file), directory, options=b.Options(threads=1)).state.tolist() == ["finished"]
    whole = train(Config.checked({**SMALL, "max_steps": 30, "output_dir": str(tmp_path / "whole")}))
    assert json.dumps(without_times(directory / run.id)) == json.dumps(without_times(whole))
    assert (directory / run.id / "policy" / "model.safetensors").read_bytes() == (whole / "policy" / "model.safetensors").read_bytes()


def notebook_seconds(directory):
    "What papermill says the notebooks took, kernel start included, and what the runs took."
    papermill = [json.loads(p.read_text())["metadata"]["papermill"]["duration"] for p in directory.glob("*/toy.ipynb")]
    return papermill, [json.loads(p.read_text())["seconds"] for p in directory.glob("*/outcome.json")]


@pytest.mark.slow
def test_overhead_of_200_runs(tmp_path, toy):
    sweep = b.expand(write(tmp_path / "s.yaml", notebook="toy", parameters=dict(steps=1), seeds=list(range(200))))
    seconds = _seconds(lambda: b.run_batch(sweep, tmp_path / "sweep", options=b.Options(threads=1)))
    own, _ = notebook_seconds(tmp_path / "sweep")
    assert len(own) == 200 and (b.status(tmp_path / "sweep").state == "finished").all()
    print(f"\n200 runs in {seconds:.0f} s: {sum(own) / 200:.2f} s a notebook, {(seconds - sum(own)) / 200:.2f} s a run beyond it")
    assert (seconds - sum(own)) / 200 < 3


@pytest.mark.slow
def test_two_workers_are_faster_than_one(tmp_path, toy):
    if os.getloadavg()[0] > 0.5 or b.cores() < 2:
        pytest.skip(f"needs two idle cores: load {os.getloadavg()[0]:.1f} on {b.cores()}")
    seconds = {}
    for workers in (1, 2):
        sweep = b.expand(write(tmp_path / "s.yaml", notebook="toy", parameters=dict(work=30_000_000), seeds=list(range(6))))
        seconds[workers] = _seconds(lambda: b.run_batch(sweep, tmp_path / str(workers), options=b.Options(workers=workers, threads=1)))
    print(f"\n{seconds[1]:.1f} s with one worker, {seconds[2]:.1f} s with two: {seconds[1] / seconds[2]:.2f}x")
    assert seconds[1] / seconds[2] > 1.7


SLURM = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000
PartitionName=test Nodes={host} Default=YES State=UP
"""


def slurm_states():
    "The states of the nodes; nothing where no Slurm answers."
    return subprocess.run(["sinfo", "--noheader", "--format", "%t"], capture_output=True, text=True, timeout=60).stdout.split()


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def slurm(monkeypatch):
    "The Slurm of this machine if it answers, else one of a single node for this test: all its files in a directory of its own, ended with the test."
    if lacking := [name for name in ("sbatch", "sinfo") if shutil.which(name) is None]:
        pytest.skip(f"no Slurm here: no {' or '.join(lacking)} on the path (Debian: slurm-wlm and munge)")
    if slurm_states():
        yield
        return
    daemons = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("munged", "slurmctld", "slurmd")]
    if None in daemons or os.geteuid():
        pytest.skip("Slurm gets no answer, and a test can start it only as root, with munged, slurmctld and slurmd installed")
    with tempfile.TemporaryDirectory(prefix="slurm") as place, open(f"{place}/log", "w") as log:  # short: a socket's path has 107 bytes
        Path(place, "key").write_bytes(os.urandom(1024))
        Path(place, "key").chmod(0o600)
        Path(place, "slurm.conf").write_text(SLURM.format(place=place, host=socket.gethostname().split(".")[0], ports=free_ports(2)))
        monkeypatch.setenv("SLURM_CONF", f"{place}/slurm.conf")
        munge = [f"--{name}={place}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        commands = [daemons[0], "--foreground", "--force", f"--key-file={place}/key", *munge], [daemons[1], "-D"], [daemons[2], "-D"]
        started = [subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL) for command in commands]
        try:
            deadline = time.time() + 30
            while "idle" not in slurm_states():
                assert time.time() < deadline and all(p.poll() is None for p in started), Path(log.name).read_text()[-3000:]
                time.sleep(0.2)
            yield
            subprocess.run(["scancel", "--me"], check=True)
            until(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout.strip(), 60)
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("steps, judged", [(10, False), (20, True)], ids=["trained", "judged"])
def test_slurm_array_with_one_task_cancelled(steps, judged, tmp_path, slurm):
    asked = dict(evaluate=dict(benchmarks=["largest_of_three"], max_problems=4, max_completion_length=6, device="cpu", seed=0)) if judged else {}
    file = write(tmp_path / "t.yaml", notebook="train", parameters={**SMALL, "max_steps": steps}, seeds=[0, 1, 2, 3], **asked, slurm=dict(time=20, cpus_per_task=1))
    directory, runs = tmp_path / "sweep", [r for r in b.expand(file).runs if r.notebook == "train"]
    process = command("import gcpo.batch as b", "run", file, "--dir", directory, "--executor", "slurm", "--workers", "2", "--threads", "1")
    victim = directory / runs[1].id
    until(lambda: list(victim.glob("checkpoints/step-*")), 300)
    job = json.loads((directory / "slurm.json").read_text())[runs[1].id]
    subprocess.run(["scancel", job], check=True)
    said = process.communicate(timeout=500)[0]
    assert process.returncode == 1 and ("7 of 9 finished, 1 interrupted, 1 waiting" if judged else "3 of 4 finished, 1 interrupted") in said, said
    assert not (victim / "policy").exists() and not marked(directory)
    again = command("import gcpo.batch as b", "run", file, "--dir", directory, "--executor", "slurm", "--workers", "2", "--threads", "1")
    said = again.communicate(timeout=500)[0]
    assert again.returncode == 0 and f"{1 + judged} runs submitted" in said and ("9 of 9 finished" if judged else "4 of 4 finished") in said, said
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what the array's runs had: sums are rounded by how many share them
    try: whole = train(Config.checked({**SMALL, "max_steps": steps, "seed": 1, "output_dir": str(tmp_path / "whole")}))
    finally: torch.set_num_threads(threads)
    assert json.dumps(without_times(victim)) == json.dumps(without_times(whole))
    assert (victim / "policy" / "model.safetensors").read_bytes() == (whole / "policy" / "model.safetensors").read_bytes()
