"""What trackers get is what metrics.jsonl holds, also of a run that was killed and continued."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml
from conftest import ROOT, SMALL

from gcpo.core import read_metrics

KILL = "import os, time, gcpo.train as t; old = t.Run.save\ndef save(self, policy, optimiser, step):\n    if step == 4: time.sleep(3); os.kill(os.getpid(), 9)\n    old(self, policy, optimiser, step)\nt.Run.save = save; t.main()"


# A tracker may lose what it has not written when it is killed: trackio half a second, which the pause lets pass; an offline wandb its last 32 KiB. metrics.jsonl loses nothing.


def tensorboard_rows(directory, home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(directory / "gcpo"), size_guidance={"scalars": 0}).Reload()
    return [(e.step, e.value) for e in events.Scalars("reward/mean")]


def trackio_rows(directory, home):
    read = "import json, sys; from trackio.sqlite_storage import SQLiteStorage; print(json.dumps(SQLiteStorage.get_logs('gcpo', 'run')))"
    done = subprocess.run([sys.executable, "-c", read], env={**os.environ, "TRACKIO_DIR": str(home / "trackio")}, capture_output=True, text=True, check=True)
    return [(row["step"], row["reward/mean"]) for row in json.loads(done.stdout.splitlines()[-1]) if "reward/mean" in row]


def wandb_records(data):
    "The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB, fragments of (checksum, length, type)."
    at, parts = 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        parts.append(data[at + 7:at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield b"".join(parts)
            parts = []


def wandb_rows(directory, home):
    from wandb.proto.wandb_internal_pb2 import Record
    told, runs = {}, set()
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(file.read_bytes())):
            runs |= {record.run.run_id} - {""}
            row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "reward/mean" in row:
                told[int(row["_step"])] = float(row["reward/mean"])
    assert len(runs) == 1
    return told.items()


ROWS = {name: rows for name, rows in dict(tensorboard=tensorboard_rows, trackio=trackio_rows, wandb=wandb_rows).items() if find_spec(name)}


@pytest.mark.skipif(not ROWS, reason="no tracker is installed (pip install 'gcpo[trackers]')")
def test_trackers_have_the_rows_of_a_run_that_was_killed_and_continued(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**SMALL, "eval_steps": 6, "report_to": list(ROWS), "output_dir": str(tmp_path / "run")}))
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for script, code in ((KILL, -9), ("from gcpo.train import main; main()", 0)):
        done = subprocess.run([sys.executable, "-c", script, "--params", tmp_path / "run.yaml"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr[-3000:]
    told = {row["step"]: pytest.approx(row["reward/mean"], rel=1e-6) for row in read_metrics(tmp_path / "run") if "reward/mean" in row}
    assert len(told) == SMALL["max_steps"]
    for name, rows in ROWS.items():
        kept = told if name != "wandb" else {step: value for step, value in told.items() if step >= 2}
        assert kept == dict(rows(tmp_path / "run", tmp_path)), name
