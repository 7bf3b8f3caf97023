"""`make bench [PART=...]`: what a training step costs, here and elsewhere; each part writes data/bench/PART.json.

SmolLM2-135M, LoRA r16 on all linear layers, fp32; questions of about 80 tokens, 60 of them shared; 16 tokens a completion, beta=.04, unless a part varies it.

step      seconds of a step in TRL 1.16 (GRPO) and here (GRPO and GCPO), alternating in one process; medians over rounds, ratios to TRL, share of the floor
literal   GCPO at n=8, J=4, m=1: the engine against every sequence alone, by transformers' generate and plain forward passes
curves    GCPO's seconds over n, L and J, beside the operations that the estimate of `gcpo.cost` gives
memory    peak memory of a process for one step of each; and what a packed pass keeps for its backward, over the number of sequences below one prefix

TRL and this are measured in the environment as it is. A glibc that keeps freed memory (MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000) makes TRL faster by a third and this by little.
The floor is the operations of a step, counted by `gcpo.cost`, over this machine's measured rate of fp32 matrix products."""
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

import gcpo.collider
import gcpo.score
from gcpo.core import PrefixTree, derive_seed
from gcpo.cost import estimate
from gcpo.data import generated_rows
from gcpo.engine import sample_generate
from gcpo.policy import load_policy, locate, reference_of
from gcpo.score import Scores, logp_alone, score
from gcpo.train import Config, Optimiser, prepare, questions_of_step, train_step

OUT = Path(__file__).parent.parent / "data" / "bench"
SAME = dict(model="smollm2", shots=3, num_generations=8, prompts_per_step=4, max_completion_length=16, stop=[], beta=0.04, learning_rate=1e-5,
            rewards=["bench:spread_out"], train_size=200, eval_size=2, max_steps=1000)
OURS = {"GRPO": dict(objective="grpo"), "GCPO, policy at x_i": dict(policy_side="x"), "GCPO, policy at x_i, contexts constant": dict(policy_side="x", context_gradient=False),
        "GCPO, policy at q": dict(policy_side="q")}


def spread_out(prompts, completions, **columns):
    "A reward that differs within every group, so that no causal stage is skipped."
    return [float(derive_seed(c) % 97) for c in completions]


def write(part: str, table: dict) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{part}.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


def matmul_rate() -> float:
    "fp32 operations a second of this machine, on matrices of 2048."
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / statistics.median(seconds)


def our_stepper(config: Config):
    "A function that takes one training step here and returns its metrics."
    recipe, policy, queries, _ = prepare(config)
    reference, optimiser, count = reference_of(policy), Optimiser(policy, config), iter(range(1000))
    def step():
        n = next(count)
        return train_step(policy, reference, [queries[i] for i in questions_of_step(len(queries), config.prompts_per_step, n, 0)], recipe, optimiser, n)[1]
    return step


def trl_stepper():
    "A function that takes one step of TRL's own training loop."
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    path, rows, taken = locate("smollm2"), generated_rows("largest_of_three", 200, shots=3), []
    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs): self.begin = time.perf_counter()
        def on_step_end(self, *args, **kwargs): taken.append(time.perf_counter() - self.begin)
    arguments = GRPOConfig(tempfile.mkdtemp(), use_cpu=True, per_device_train_batch_size=32, num_generations=8, max_completion_length=16, beta=0.04, learning_rate=1e-5,
                           max_steps=1, report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True, gradient_checkpointing=False, bf16=False, seed=0)
    trainer = GRPOTrainer(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), reward_funcs=spread_out, args=arguments, processing_class=AutoTokenizer.from_pretrained(path),
                          train_dataset=Dataset.from_list([{"prompt": r.prompt + r.cue} for r in rows]), callbacks=[Clock()],
                          peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    def step():
        trainer.train()
        return {"time/step": taken[-1]}
    return step


def alternate(steppers: dict, rounds: int, warm_up: int = 1) -> tuple[dict, dict]:
    "Seconds of each stepper in each round, after rounds of warm-up; and the median seconds of their stages."
    seconds, stages = {name: [] for name in steppers}, {name: [] for name in steppers}
    for turn in range(1 - warm_up, rounds + 1):
        for name, step in steppers.items():
            begin = time.perf_counter()
            metrics = step()
            took = metrics.get("time/step", time.perf_counter() - begin)
            if turn:
                seconds[name].append(took)
                stages[name].append({k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/")})
            print(f"round {turn}  {name:40s} {took:7.2f} s" + ("" if turn else "  (warm-up)"), flush=True)
    return seconds, {name: {k: round(statistics.median(s[k] for s in told), 2) for k in told[0]} for name, told in stages.items()}


def summary(seconds: list[float]) -> dict:
    return dict(median=round(statistics.median(seconds), 2), all=[round(s, 2) for s in seconds])


def step(rounds: int = 5) -> None:
    configs = {name: Config.checked({**SAME, **changes}) for name, changes in OURS.items()}
    rates = [matmul_rate()]
    seconds, stages = alternate({"TRL GRPO": trl_stepper(), **{name: our_stepper(c) for name, c in configs.items()}}, rounds)
    rates.append(matmul_rate())
    rate, trl = statistics.mean(rates), statistics.median(seconds["TRL GRPO"])
    table = {name: {**summary(s), "ratio_to_trl": round(statistics.median(s) / trl, 3)} for name, s in seconds.items()}
    for name, config in configs.items():
        floor = estimate(config).flops / rate
        table[name].update(floor=round(floor, 2), share_of_floor=round(floor / table[name]["median"], 2), stages=stages[name])
    write("step", dict(gflops=round(rate / 1e9), threads=torch.get_num_threads(), steps=table))


def score_alone(policy, tree: PrefixTree, scored, states=(), temperature: float = 1.0, entropy: bool = False) -> Scores:
    "`score` without a tree: a plain forward pass a sequence. The entropy, a metric, is left out."
    logp = [logp_alone(policy, tree.ids(tree.parents[k]), tree.segments[k]) for k in scored]
    last = [policy.causal_lm.base_model(tree.ids(k)[None]).last_hidden_state[0, -1] for k in states]
    return Scores(logp, [x.detach() * 0 for x in logp], torch.stack(last) if last else torch.empty(0))


def literal_stepper(config: Config):
    "A step of the same estimator in which every sequence is alone: generated by transformers' generate, scored by a plain forward pass."
    recipe, policy, queries, _ = prepare(config)
    engine = partial(sample_generate, token_budget=1)
    from dataclasses import replace
    recipe = replace(recipe, engine=engine, collider=replace(recipe.collider, engine=engine))
    reference, optimiser, count = reference_of(policy), Optimiser(policy, config), iter(range(1000))
    def step():
        n = next(count)
        gcpo.score.score, gcpo.collider.score = score_alone, score_alone
        try:
            return train_step(policy, reference, [queries[i] for i in questions_of_step(len(queries), config.prompts_per_step, n, 0)], recipe, optimiser, n)[1]
        finally:
            gcpo.score.score, gcpo.collider.score = score, score
    return step


def literal(rounds: int = 5) -> None:
    config = Config.checked({**SAME, "num_draws": 4, "groups_per_microbatch": 1})
    seconds, stages = alternate({"engine": our_stepper(config), "every sequence alone": literal_stepper(config)}, rounds, warm_up=0)
    ratio = statistics.median(seconds["every sequence alone"]) / statistics.median(seconds["engine"])
    write("literal", dict(ratio=round(ratio, 2), **{name: {**summary(s), "stages": stages[name]} for name, s in seconds.items()}))


def curves(rounds: int = 2) -> None:
    base, rate = dict(SAME, prompts_per_step=2), matmul_rate()
    lengths = lambda L: dict(max_completion_length=L, max_draw_length=L, max_continuation_length=L)
    points = [("n", n, dict(num_generations=n)) for n in (2, 4, 8, 16)] + [("L", L, lengths(L)) for L in (8, 16, 32, 64)] + [("J", J, dict(num_draws=J)) for J in (2, 3, 4, 8)]
    rows = []
    for over, value, changes in points:
        config = Config.checked({**base, **changes})
        seconds, _ = alternate({f"{over}={value}": our_stepper(config)}, rounds)
        (took,) = seconds.values()
        rows.append(dict(over=over, value=value, seconds=summary(took)["median"], floor=round(estimate(config).flops / rate, 2)))
    write("curves", dict(gflops=round(rate / 1e9), rows=rows))


def peak(name: str) -> None:
    "One step in a process of its own; prints the peak of its resident memory, in bytes, before the step and after."
    step = trl_stepper() if name == "TRL GRPO" else our_stepper(Config.checked({**SAME, **OURS[name]}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    print("PEAK", before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def kept_bytes(policy, compute) -> int:
    "Bytes of the tensors that autograd keeps for the backward pass of `compute()`, weights apart."
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = compute()
    return sum(kept.values()) * bool(held)


def memory() -> None:
    write("memory", dict(peaks=peaks(), rows=kept_over_sequences()))


def peaks() -> dict:
    peaks = {}
    for name in ["TRL GRPO", *OURS]:
        told = subprocess.run([sys.executable, __file__, "peak", name], capture_output=True, text=True, check=True).stdout
        before, after = map(int, told.split("PEAK ")[1].split()[:2])
        peaks[name] = dict(loaded_gib=round(before / 2**30, 2), peak_gib=round(after / 2**30, 2))
        print(name, peaks[name], flush=True)
    return peaks


def kept_over_sequences() -> list[dict]:
    "What a packed pass keeps over the number of completions of 16 tokens below a prompt of 256; every sequence alone, up to 8."
    policy, rows = load_policy("smollm2", lora=16, device="cpu"), []
    draw = lambda n, seed: torch.randint(1000, 9000, (n,), generator=torch.Generator().manual_seed(seed))
    for count in (1, 2, 4, 8, 16, 32):
        tree = PrefixTree()
        nodes = [tree.add(-1, draw(256, 0), draw(16, r + 1)) for r in range(count)]
        packed = kept_bytes(policy, lambda: score(policy, tree, nodes).logp)
        alone = kept_bytes(policy, lambda: score_alone(policy, tree, nodes).logp) if count <= 8 else None
        rows.append(dict(sequences=count, unique_tokens=tree.tokens, all_tokens=272 * count, packed_mib=round(packed / 2**20), alone_mib=alone and round(alone / 2**20)))
        print(rows[-1], flush=True)
    return rows


PARTS = dict(step=step, literal=literal, curves=curves, memory=memory)

if __name__ == "__main__":
    sys.modules.setdefault("bench", sys.modules["__main__"])
    asked, rounds = sys.argv[1:2] or [""], [int(x) for x in sys.argv[2:3] if x.isdigit()]
    if asked[0] == "peak":
        peak(sys.argv[2])
    else:
        for part in [asked[0]] if asked[0] else PARTS:
            PARTS[part](*rounds)
