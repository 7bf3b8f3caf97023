"""A thousand steps in one process: what is held in memory does not grow, nothing is left open, and the policy stays one that answers."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL
from scipy.stats import linregress

STEPS, SETTLED, EVERY = 1000, 300, 10  # by step 300 three evaluations and three checkpoints have been
WATCHED = """
import ctypes, json, sys
import psutil
import gcpo.train as t

class Heap(ctypes.Structure):  # glibc's mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

own, libc, plain, samples = psutil.Process(), ctypes.CDLL(None), t.train_step, []
libc.mallinfo2.restype = Heap

def watched(policy, reference, queries, recipe, optimiser, step):
    if step % {every} == 0:
        heap = libc.mallinfo2()
        samples.append(dict(step=step, held=(heap.uordblks + heap.hblkhd) / 2**20, resident=own.memory_info().rss / 2**20, files=own.num_fds(), threads=own.num_threads()))
    return plain(policy, reference, queries, recipe, optimiser, step)

t.train_step = watched
t.train(t.Config.checked(json.loads(sys.argv[1])))
print("SAMPLES", json.dumps(samples))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what is held")
def test_a_thousand_steps(tmp_path):
    """Held: what the process has allocated and not given back, Python's objects and tensors alike. Resident memory is that and what the allocator keeps for later: it is reported,
    and may not grow by a twentieth."""
    parameters = {**SMALL, "learning_rate": 1e-4, "max_steps": STEPS, "eval_steps": 100, "save_steps": 100, "eval_size": 100, "prompts_per_step": 2, "num_iterations": 1, "train_size": 500,
                  "lr_scheduler_type": "constant", "logging_steps": STEPS, "output_dir": str(tmp_path / "run")}
    done = subprocess.run([sys.executable, "-c", WATCHED.replace("{every}", str(EVERY)), json.dumps(parameters)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "reward/mean" in row]
    assert len(rows) == STEPS and all(np.isfinite(v) for row in rows for v in row.values())

    samples = [s for s in json.loads(done.stdout.split("SAMPLES ")[1]) if s["step"] >= SETTLED]
    step, held, resident = (np.array([s[key] for s in samples]) for key in ("step", "held", "resident"))
    slope = linregress(step, held)
    grown = resident[-10:].mean() / resident[:10].mean() - 1
    told = f"held {1000 * slope.slope:+.3f} ± {1000 * slope.stderr:.3f} MiB in 1000 steps, of {held.mean():.0f} (p = {slope.pvalue:.2f}); resident {resident.mean():.0f} MiB, {grown:+.1%} from step {step[5]} to {step[-5]}"
    print(told)
    assert slope.pvalue > .01 or slope.slope < 0, told
    assert grown < .05 and samples[-1]["files"] <= samples[0]["files"] and samples[-1]["threads"] <= samples[0]["threads"], told

    drawn = np.abs(np.array([row["ratio/mean"] for row in rows if "ratio/mean" in row]) - 1)  # one pass a batch: the policy that samples is the one that learns
    evaluated = [row for row in rows if "eval/reward" in row]
    print(f"|ratio - 1| at most {drawn.max():.1e}; held-out {evaluated[0]['eval/reward']:.0%} -> {evaluated[-1]['eval/reward']:.0%}, best {max(r['eval/reward'] for r in evaluated):.0%}")
    assert drawn.max() < 1e-4 and evaluated[-1]["eval/high"] >= max(row["eval/reward"] for row in evaluated) and evaluated[-1]["eval/reward"] > evaluated[0]["eval/high"]
