"""A thousand steps in one process: memory does not grow, nothing is left open, and the policy stays one that answers."""
import json
import os
import subprocess
import time

import numpy as np
import psutil
import pytest
import yaml
from conftest import BIN, ROOT, SMALL
from scipy.stats import linregress

STEPS, SETTLED, BLOCK = 1000, 300, 50  # by step 300 three evaluations and three checkpoints have been


def watched(parameters, place) -> tuple[list[dict], list[dict]]:
    "A run of `gcpo-train` watched from outside -> its metrics, and samples of step, resident MiB, open files and threads."
    (place / "run.yaml").write_text(yaml.safe_dump(parameters))
    with (place / "out.txt").open("w") as out:
        process = psutil.Popen([BIN / "gcpo-train", "--params", place / "run.yaml"], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        file, samples = place / "run" / "metrics.jsonl", []
        while process.poll() is None:
            time.sleep(.2)
            if file.exists():
                try:
                    with process.oneshot():
                        samples.append(dict(step=file.read_bytes().count(b"\n"), mib=process.memory_info().rss / 2**20, files=process.num_fds(), threads=process.num_threads()))
                except psutil.Error:
                    break
    assert process.wait() == 0, (place / "out.txt").read_text()[-3000:]
    return [json.loads(row) for row in file.read_text().splitlines()], samples


@pytest.mark.slow
def test_a_thousand_steps(tmp_path):
    parameters = {**SMALL, "model": "tiny", "learning_rate": 1e-4, "max_steps": STEPS, "eval_steps": 100, "save_steps": 100, "eval_size": 100, "prompts_per_step": 2, "num_iterations": 1, "train_size": 500,
                  "lr_scheduler_type": "constant", "logging_steps": STEPS, "output_dir": str(tmp_path / "run")}
    rows, samples = watched(parameters, tmp_path)
    rows = [row for row in rows if "reward/mean" in row]
    assert len(rows) == STEPS and all(np.isfinite(v) for row in rows for v in row.values())

    settled = [s for s in samples if s["step"] >= SETTLED]
    blocks = np.array([[np.mean([s[k] for s in settled if s["step"] // BLOCK == b]) for k in ("step", "mib")] for b in range(SETTLED // BLOCK, STEPS // BLOCK)])
    slope = linregress(*blocks.T)
    told = f"{1000 * slope.slope:+.2f} MiB in 1000 steps ± {1000 * slope.stderr:.2f}, at {blocks[:, 1].mean():.0f} MiB (p = {slope.pvalue:.2f})"
    print(told, "|", f"{min(s['mib'] for s in settled):.0f}-{max(s['mib'] for s in settled):.0f} MiB |", f"files {[*{s['files'] for s in settled}]}, threads {[*{s['threads'] for s in settled}]}")
    assert slope.pvalue > .01 or slope.slope < 0, f"memory grows: {told}"
    calm = lambda key, part: np.median([s[key] for s in part])
    assert calm("files", settled[-50:]) <= calm("files", settled[:50]) and calm("threads", settled[-50:]) <= calm("threads", settled[:50])

    drawn = np.abs(np.array([row["ratio/mean"] for row in rows if "ratio/mean" in row]) - 1)  # one pass a batch: the policy that samples is the one that learns
    held = [row for row in rows if "eval/reward" in row]
    print(f"|ratio - 1| at most {drawn.max():.1e}; held-out {held[0]['eval/reward']:.0%} -> {held[-1]['eval/reward']:.0%}, best {max(r['eval/reward'] for r in held):.0%}")
    assert drawn.max() < 1e-4 and held[-1]["eval/high"] >= max(row["eval/reward"] for row in held) and held[-1]["eval/reward"] > held[0]["eval/high"]
