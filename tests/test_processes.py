"""Two processes are one: DDP, FSDP2 and, where DeepSpeed is installed, ZeRO-3 over gloo give the single process's losses, weights and files, continue each other's checkpoints, and end together."""
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import BIN, ROOT, SMALL
from safetensors.torch import load_file

from gcpo.core import read_metrics
from gcpo.parallel import World, share
from gcpo.train import Config, read_completions, train

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
SMALL = {**SMALL, "max_steps": 4, "dtype": "float64"}  # in float32 AdamW makes steps of gradients that are nothing but rounding: weights then differ by 1e-5 and more, by the kind of processor
LIMIT = 240  # seconds: processes that wait for each other for ever are a failure
ACCELERATE = ROOT / "nbs" / "params" / "accelerate"

# Runs several cases in the same processes; tells, of each case and process, how many collective calls were made and how many numbers were held.
DRIVER = '''
import json, os, sys
from functools import partial
import torch.distributed as dist
import gcpo.train as t
from gcpo.parallel import Part, gather, held as part, join, leave, sharded, world

step, learn, told = t.Optimiser.step, t.train_step, []

def until(last, *args):
    if args[-1] == last: raise KeyboardInterrupt
    return learn(*args)

def held(self, check):
    size = lambda tensors: sum((x.local if isinstance(x, Part) else x.to_local() if sharded(x) else x).numel() for x in map(part, tensors))
    told[-1]["grads"] = size([w.grad for w in self.weights if w.grad is not None])
    norm = step(self, check)
    told[-1].update(weights=size(self.weights), moments=size([s["exp_avg"] for s in self.adamw.state.values()]))
    return norm

t.Optimiser.step = held
join(2, "cpu")
calls = dist.group.WORLD._get_sequence_number_for_group
for case in json.load(open(sys.argv[1])):
    os.environ.update(ACCELERATE_USE_FSDP=str(case["how"] == "fsdp2"), FSDP_VERSION="2", ACCELERATE_USE_DEEPSPEED=str(case["how"] == "zero3"), ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    t.train_step, before = partial(until, case["until"]), calls()
    told.append(dict(name=case["name"], rank=world().rank))
    try: t.train(t.Config.checked(case["parameters"]))
    except KeyboardInterrupt: pass
    told[-1]["calls"] = calls() - before
everything = gather(told)
if world().first: open(sys.argv[2], "w").write(json.dumps(everything))
leave()
'''


def marked(mark: str) -> list[int]:
    "Processes of this machine whose environment holds a mark."
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(place.name)] if mark.encode() in (place / "environ").read_bytes() else []
        except OSError:
            pass
    return [pid for pid in found if pid != os.getpid()]


def run(command, mark: str, timeout: float = LIMIT, **environment):
    "A command to its end; past the timeout it is killed, and with it what it has started. None of its processes is left."
    started = subprocess.Popen([*map(str, command)], cwd=ROOT, env={**ENV, "TEST_MARK": mark, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        printed = f"{started.communicate()[0]}\nno end after {timeout} s"
    deadline = time.time() + 20
    while marked(mark) and time.time() < deadline:
        time.sleep(0.2)
    assert not marked(mark), "processes are left"
    return started.returncode, printed


def two(directory, cases) -> list[dict]:
    "Run cases, each a name, a strategy, parameters and a step before which to stop, in two processes; what each process tells of each."
    (directory / "driver.py").write_text(DRIVER)
    (directory / "cases.json").write_text(json.dumps(cases))
    code, printed = run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", directory / "driver.py", directory / "cases.json", directory / "told.json"], f"two-{directory}")
    assert code == 0, printed[-6000:]
    return json.loads((directory / "told.json").read_text())


def case(directory, name, how, until=math.inf, **changes) -> dict:
    return dict(name=name, how=how, until=until if until < math.inf else -1, parameters={**SMALL, **changes, "output_dir": str(directory / name)})


def alone(directory, name, **changes) -> Path:
    return train(Config.checked({**SMALL, **changes, "output_dir": str(directory / name)}))


def weights(run_dir) -> dict:
    policy = Path(run_dir) / "policy"
    return load_file(policy / ("model.safetensors" if (policy / "model.safetensors").exists() else "adapter_model.safetensors"))


def gap(a, b) -> float:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def assert_same_run(ours, single, near=1e-5, weights_near=1e-6):
    "The same metrics (times apart), losses within `near`, completions, and final weights within `weights_near`."
    rows = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(d)] for d in (ours, single)]
    assert [sorted(row) for row in rows[0]] == [sorted(row) for row in rows[1]]
    for mine, theirs in zip(*rows):
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=near, abs=near), (mine["step"], name)
    mine, theirs = read_completions(ours), read_completions(single)
    numbers = ["advantage", "reward", "upsilon", "influence", "weight"]
    pd.testing.assert_frame_equal(mine.drop(columns=numbers), theirs.drop(columns=numbers))
    pd.testing.assert_frame_equal(mine[numbers], theirs[numbers], rtol=10 * near, atol=near)
    assert gap(ours, single) < weights_near
    told = [json.loads((Path(d) / "manifest.json").read_text()) for d in (ours, single)]
    assert told[0]["config"] == told[1]["config"] and told[0].keys() == told[1].keys() and not {"num_processes", "accelerate_config"} & {*told[0]["config"]}
    assert sorted(p.name for p in Path(ours).rglob("*")) == sorted(p.name for p in Path(single).rglob("*"))


VARIANTS = {"full": dict(), "lora": dict(lora_r=4), "unequal": dict(beta=0.0, groups_per_microbatch=1, context_gradient=False, max_steps=3, seed=6)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "One process's runs; and two processes', all in one launch: by both strategies, two of them stopped before their third step, two that continue what one process has begun."
    directory = tmp_path_factory.mktemp("runs")
    for name, changes in VARIANTS.items():
        alone(directory, name, **changes)
    with pytest.MonkeyPatch.context() as patch:
        import gcpo.train as module
        learn = module.train_step

        def stop(*args):
            if args[-1] == 2:
                raise KeyboardInterrupt
            return learn(*args)
        patch.setattr(module, "train_step", stop)
        for name, changes in (("begun-full", {}), ("begun-lora", VARIANTS["lora"])):
            with pytest.raises(KeyboardInterrupt):
                alone(directory, name, **changes)
    cases = [case(directory, f"{name}-{how}", how, **changes) for name, changes in VARIANTS.items() for how in ("ddp", "fsdp2")]
    cases += [case(directory, "stopped-full", "fsdp2", until=2), case(directory, "stopped-lora", "ddp", until=2, **VARIANTS["lora"])]
    cases += [case(directory, "begun-full", "fsdp2"), case(directory, "begun-lora", "ddp", **VARIANTS["lora"])]
    return directory, two(directory, cases)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_processes_give_the_run_of_one(name, how, runs):
    assert_same_run(runs[0] / f"{name}-{how}", runs[0] / name)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_also_when_micro_batches_are_unequal(how, runs):
    assert_same_run(runs[0] / f"unequal-{how}", runs[0] / "unequal")


def test_some_steps_leave_one_process_without_signal(runs):
    completions = read_completions(runs[0] / "unequal")
    shares = []
    for _, step in completions.groupby("step"):
        mixed = [len(set(group.reward)) > 1 for _, group in step.groupby("query", sort=False)]
        shares.append([any(share(mixed, World(rank, 2))) for rank in (0, 1)])
    assert [False, True] in shares or [True, False] in shares, shares


def test_every_process_makes_the_same_number_of_calls(runs):
    by_case = pd.DataFrame(runs[1]).pivot(index="name", columns="rank", values="calls")
    assert (by_case[0] == by_case[1]).all() and (by_case > 0).all().all()
    assert by_case.loc["full-fsdp2", 0] > by_case.loc["full-ddp", 0]


def test_fsdp2_really_shards(runs):
    told = pd.DataFrame(runs[1]).set_index(["name", "rank"])
    for name in ("full", "lora"):
        whole = told.loc[(f"{name}-ddp", 0)]
        parts = told.loc[f"{name}-fsdp2"]
        for kind in ("weights", "grads", "moments"):
            assert parts[kind].sum() == whole[kind] and parts[kind].max() < 0.6 * whole[kind], (name, kind)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_one_process_continues_what_two_have_written(name, runs):
    directory = runs[0]
    assert not (directory / f"stopped-{name}" / "policy").exists() and (directory / f"stopped-{name}" / "checkpoints" / "step-000002").is_dir()
    alone(directory, f"stopped-{name}", **VARIANTS[name])
    assert_same_run(directory / f"stopped-{name}", directory / name)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_processes_continue_what_one_has_written(name, runs):
    assert_same_run(runs[0] / f"begun-{name}", runs[0] / name)


def command(directory, **changes) -> list:
    parameters = {**SMALL, "output_dir": str(directory / "run"), **changes}
    (directory / "run.yaml").write_text(yaml.safe_dump(parameters))
    return [sys.executable, "-m", "gcpo.train", "--params", directory / "run.yaml"]


def test_killing_one_process_ends_all_and_a_restart_continues(tmp_path, runs):
    mark, log = f"kill-{tmp_path}", tmp_path / "run" / "metrics.jsonl"
    started = subprocess.Popen([*map(str, command(tmp_path, num_processes=2))], cwd=ROOT, env={**ENV, "TEST_MARK": mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + LIMIT
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.05)
    ranks = {pid: "RANK=1" in (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0") for pid in marked(mark)}
    second, = [pid for pid, is_second in ranks.items() if is_second]
    os.kill(second, signal.SIGKILL)
    printed, _ = started.communicate(timeout=60)
    assert started.returncode == 1 and "error: 2 processes of gcpo.train ended" in printed and f"Signal 9 (SIGKILL) received by PID {second}" in printed, printed[-3000:]
    assert not marked(mark) and not (tmp_path / "run" / "policy").exists()
    assert_same_run(alone(tmp_path, "run"), runs[0] / "full")


def test_what_did_not_start_as_asked_is_an_error(tmp_path):
    configuration = yaml.safe_load((ACCELERATE / "ddp_cpu.yaml").read_text())
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**configuration, "distributed_type": "MULTI_CPU"}))
    code, printed = run(command(tmp_path, num_processes=2, accelerate_config=str(tmp_path / "one.yaml")), f"one-{tmp_path}")
    assert code == 1 and "num_processes=2, but 1 started" in printed, printed[-3000:]


def test_what_cannot_be_shared_is_refused_before_anything_starts(tmp_path):
    for changes, told in [(dict(prompts_per_step=1, num_processes=2), "at least 2 prompts a step"), (dict(num_processes=2, accelerate_config="no.yaml"), "is no file"), (dict(num_processes=2, objective="rest_mcts"), "in one process")]:
        code, printed = run(command(tmp_path, **changes), f"refused-{tmp_path}")
        assert code == 1 and told in printed and "Traceback" not in printed, printed


def test_accelerate_files_are_what_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    for file in sorted(ACCELERATE.glob("*.yaml")):
        read, how = load_config_from_file(str(file)), file.stem.removesuffix("_cpu")
        assert read.num_processes == (2 if "cpu" in file.stem else 8) and not read.use_cpu and str(read.distributed_type).endswith(kinds[how])
        assert how != "fsdp2" or read.fsdp_config["fsdp_version"] == 2
        assert how != "zero3" or read.deepspeed_config["zero_stage"] == 3 and not read.deepspeed_config["zero3_init_flag"]
    subprocess.run(["bash", "-n", ACCELERATE / "multinode.sbatch"], check=True)


FLOAT32 = dict(near=1e-4, weights_near=1e-4)  # DeepSpeed trains float32 weights: see SMALL
ZERO3_VARIANTS = {**VARIANTS, "checkpointing": dict(gradient_checkpointing=True, max_steps=3)}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'gcpo[deepspeed]'")


@pytest.fixture(scope="module")
def zero3_runs(tmp_path_factory):
    "As `runs`, by ZeRO-3 and in float32."
    directory, float32 = tmp_path_factory.mktemp("zero3"), dict(dtype="float32")
    for name, changes in ZERO3_VARIANTS.items():
        alone(directory, name, **changes, **float32)
    cases = [case(directory, f"{name}-zero3", "zero3", **changes, **float32) for name, changes in ZERO3_VARIANTS.items()]
    for name in ("full", "lora"):
        changes = {**VARIANTS[name], **float32}
        cases += [case(directory, f"stopped-{name}", "zero3", until=2, **changes), case(directory, f"begun-{name}", "ddp", until=2, **changes), case(directory, f"begun-{name}", "zero3", **changes)]
    return directory, two(directory, cases)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO3_VARIANTS)
def test_two_processes_by_zero3_give_the_run_of_one(name, zero3_runs):
    assert_same_run(zero3_runs[0] / f"{name}-zero3", zero3_runs[0] / name, **FLOAT32)


@needs_deepspeed
@pytest.mark.slow
def test_zero3_really_shards(zero3_runs):
    told = pd.DataFrame(zero3_runs[1]).set_index(["name", "rank"])
    for name in ("full", "lora"):
        parts, trained = told.loc[f"{name}-zero3"], sum(w.numel() for w in weights(zero3_runs[0] / name).values())
        for kind in ("weights", "moments"):
            assert trained <= parts[kind].sum() < 1.01 * trained + 2 and parts[kind].max() < 0.6 * trained, (name, kind)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_checkpoints_of_zero3_and_others_continue_each_other(name, zero3_runs):
    directory = zero3_runs[0]
    assert_same_run(directory / f"begun-{name}", directory / name, **FLOAT32)
    assert not (directory / f"stopped-{name}" / "policy").exists()
    alone(directory, f"stopped-{name}", **VARIANTS[name], dtype="float32")
    assert_same_run(directory / f"stopped-{name}", directory / name, **FLOAT32)


@needs_deepspeed
@pytest.mark.slow
def test_zero3_in_bfloat16_is_ddp_in_bfloat16(tmp_path, zero3_runs):
    two(tmp_path, [case(tmp_path, how, how, dtype="float32", bf16=True, max_steps=1) for how in ("ddp", "zero3")])
    ours, ddp = (read_metrics(tmp_path / how)[0] for how in ("zero3", "ddp"))
    assert {k: v for k, v in ours.items() if not k.startswith("time/")} == pytest.approx({k: v for k, v in ddp.items() if not k.startswith("time/")}, rel=1e-4, abs=1e-4)
    assert abs(ours["optim/grad_norm"] - read_metrics(zero3_runs[0] / "checkpointing")[0]["optim/grad_norm"]) > 1e-3  # that of float32


@needs_deepspeed
@pytest.mark.slow
def test_accelerate_launches_zero3(tmp_path, zero3_runs):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE / "zero3_cpu.yaml", "-m", "gcpo.train", *command(tmp_path, dtype="float32")[3:]]
    code, printed = run(launch, f"launch-{tmp_path}")
    assert code == 0 and "2 processes, zero3, gloo" in printed and "held out, after" in printed, printed[-3000:]
    assert_same_run(tmp_path / "run", zero3_runs[0] / "full", **FLOAT32)


@needs_deepspeed
@pytest.mark.slow
def test_zero3_refuses_other_weights_than_float32(tmp_path):
    code, printed = run(command(tmp_path, num_processes=2, accelerate_config=str(ACCELERATE / "zero3_cpu.yaml")), f"float64-{tmp_path}")
    assert code == 1 and "trains float32 weights only" in printed, printed[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_accelerate_launch(how, tmp_path, runs):
    launch = [BIN / "accelerate", "launch", "--config_file", ACCELERATE / f"{how}_cpu.yaml", "-m", "gcpo.train", *command(tmp_path)[3:]]
    code, printed = run(launch, f"launch-{tmp_path}")
    assert code == 0 and f"2 processes, {how}, gloo" in printed and "held out, after" in printed, printed[-3000:]
    assert_same_run(tmp_path / "run", runs[0] / "full")


@pytest.mark.slow
def test_the_notebook_starts_processes(tmp_path, runs):
    command(tmp_path, num_processes=2, accelerate_config=str(ACCELERATE / "fsdp2_cpu.yaml"))
    code, printed = run([BIN / "papermill", ROOT / "nbs" / "50_train.ipynb", tmp_path / "out.ipynb", "-f", tmp_path / "run.yaml", "--no-progress-bar"], f"notebook-{tmp_path}")
    assert code == 0, printed[-3000:]
    outputs = "".join(json.dumps(c.get("outputs", "")) for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"])
    assert "2 processes, fsdp2, gloo" in outputs and "step    3" in outputs and "held out, after" in outputs
    assert_same_run(tmp_path / "run", runs[0] / "full")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
@pytest.mark.parametrize("changes", [dict(policy_side="q", centre=True, similarity="cosine", gradient_checkpointing=True, beta=0.0), dict(weight="influence", lora_r=4, engine="generate", prompts_per_step=5, gradient_checkpointing=True),
                                     dict(method="grpo", lora_r=4), dict(method="gvpo", beta=0.1)], ids=["centred", "influence", "grpo", "gvpo"])
def test_other_methods(how, changes, tmp_path):
    changes = {**changes, "dtype": "float32"} if how == "zero3" else changes
    alone(tmp_path, "one", max_steps=3, **changes)
    two(tmp_path, [case(tmp_path, "two", how, max_steps=3, **changes)])
    rows = [read_metrics(tmp_path / name) for name in ("one", "two")]
    for mine, theirs in zip(*rows):
        assert mine.get("loss/total", 0) == pytest.approx(theirs.get("loss/total", 0), abs=1e-5) and mine["step"] == theirs["step"]
    assert gap(tmp_path / "one", tmp_path / "two") < 1e-4


@pytest.mark.slow
def test_the_slurm_template_on_two_machines_that_are_one(tmp_path, runs):
    (tmp_path / "bin").mkdir()
    stubs = {"scontrol": "echo 127.0.0.1", "srun": 'shift\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\nwait $first && wait $second', "bash": 'exec /bin/bash "$@"'}
    for name, body in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'export PATH="{tmp_path}/bin:{BIN}:$PATH"\n')
    slurm = dict(VENV=str(tmp_path / "venv"), SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1", SLURM_JOB_NODELIST="a[1-2]", SLURM_JOB_ID=str(os.getpid()), SLURM_CPUS_PER_TASK="1")
    code, printed = run(["/bin/bash", ACCELERATE / "multinode.sbatch", command(tmp_path)[-1], ACCELERATE / "fsdp2_cpu.yaml"], f"slurm-{tmp_path}", **slurm)
    assert code == 0 and "2 processes, fsdp2, gloo" in printed, printed[-3000:]
    assert_same_run(tmp_path / "run", runs[0] / "full")
