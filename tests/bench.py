"""`make bench`: seconds of one training step, here and in TRL, alternating in one process; writes data/bench/step.json.

SmolLM2-135M, LoRA r16 on all linear layers, fp32, 4 prompts x 8 samples x 16 tokens, beta=.04, the same prompts and reward for all.
Medians over the rounds; ratios are to TRL's GRPO of the same process. The floor is the arithmetic that GRPO needs over this machine's measured
fp32 matmul rate: 2 FLOPs a weight and token to sample, for the reference, for the policy, and for the gradients of its activations."""
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

from gcpo.core import derive_seed
from gcpo.data import generated_rows
from gcpo.policy import locate, reference_of
from gcpo.train import Config, Optimiser, prepare, questions_of_step, train_step

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
SAME = dict(model="smollm2", shots=3, num_generations=8, prompts_per_step=4, max_completion_length=16, stop=[], beta=0.04, learning_rate=1e-5,
            rewards=["bench:spread_out"], train_size=200, eval_size=2, max_steps=1000)
OURS = {"GRPO": dict(objective="grpo"), "GCPO, J=2, m=1, policy at x_i": dict(policy_side="x"), "GCPO, J=2, m=1, policy at q": dict(policy_side="q")}


def spread_out(prompts, completions, **columns):
    "A reward that differs within every group, so that no causal stage is skipped."
    return [float(derive_seed(c) % 97) for c in completions]


def matmul_rate() -> float:
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / statistics.median(seconds)


def our_stepper(changes: dict):
    config = Config.checked({**SAME, **changes})
    recipe, policy, queries, _ = prepare(config)
    reference, optimiser, count = reference_of(policy), Optimiser(policy, config), iter(range(1000))
    def step():
        n = next(count)
        _, metrics = train_step(policy, reference, [queries[i] for i in questions_of_step(len(queries), 4, n, 0)], recipe, optimiser, n)
        return metrics
    return step


def trl_stepper():
    "A function that takes one step of TRL's own training loop: its trainer runs in this thread's stead until the next step ends."
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    path = locate("smollm2")
    rows = generated_rows("largest_of_three", 200, shots=3)
    taken = []
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


def main():
    sys.modules.setdefault("bench", sys.modules["__main__"])
    steppers = {"TRL GRPO": trl_stepper(), **{name: our_stepper(changes) for name, changes in OURS.items()}}
    seconds, stages = {name: [] for name in steppers}, {}
    for turn in range(ROUNDS + 1):
        for name, step in steppers.items():
            begin = time.perf_counter()
            metrics = step()
            took = metrics.get("time/step", time.perf_counter() - begin)
            if turn:
                seconds[name].append(took)
                stages[name] = {k: round(v, 2) for k, v in metrics.items() if k.startswith("time/")}
            print(f"round {turn}  {name:32s} {took:6.2f} s" + ("" if turn else "  (warm-up)"), flush=True)
    trl, rate = statistics.median(seconds["TRL GRPO"]), matmul_rate()
    table = {name: dict(median=round(statistics.median(s), 2), all=[round(x, 2) for x in s], ratio_to_trl=round(statistics.median(s) / trl, 3), last_stages=stages[name]) for name, s in seconds.items()}
    weights, tokens = 134.5e6, 4 * (8 * 16) + 60 + 4 * 19
    table["floor of GRPO"] = dict(seconds=round(4 * 2 * weights * tokens / rate, 2), gflops=round(rate / 1e9), tokens=tokens)
    out = Path(__file__).parent.parent / "data" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "step.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
