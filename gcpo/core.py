
#| export
import difflib, hashlib, json, os, platform, subprocess, sys
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor



#| export
def derive_seed(*parts: int | str) -> int:
    "A 63-bit seed from an address such as `(seed, step, 'rollout', prompt, response)`; equal addresses, equal seeds."
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1



#| export
def nearest(name: str, valid: Sequence[str]) -> str:
    "The hint `; did you mean 'x'?` for a misspelt name, or an empty string if nothing is close."
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def choose(name: str, table: Mapping[str, Any], what: str) -> Any:
    "`table[name]`. Raises ValueError with the valid names and the nearest one when there is no such `what`."
    if name not in table:
        raise ValueError(f"unknown {what} '{name}'{nearest(name, table)} (valid: {', '.join(table)})")
    return table[name]



#| export
class Parameters(BaseModel):
    "A set of named, typed, bounded parameters; unknown names, wrong types and non-finite numbers are errors."
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @classmethod
    def checked(cls, values: Mapping[str, Any], source: str = "parameters") -> "Parameters":
        "Build from a mapping. Raises ValueError listing *all* faults, each with value, place and remedy."
        try:
            return cls(**values)
        except ValidationError as error:
            lines = [cls._sentence(fault) for fault in error.errors()]
            raise ValueError(f"{source}: " + "\n  ".join([f"{len(lines)} fault(s)", *lines])) from None

    @classmethod
    def _sentence(cls, fault: Mapping[str, Any]) -> str:
        name = str(fault["loc"][0]) if fault["loc"] else "together"
        if fault["type"] == "extra_forbidden":
            return f"'{name}' is not a parameter{nearest(name, list(cls.model_fields))}"
        if fault["type"] == "value_error":
            return f"{name}: {fault['ctx']['error']}"
        hint = nearest(fault["input"], fault["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")) if fault["type"] == "literal_error" else ""
        told = f" ({cls.model_fields[name].description})" if name in cls.model_fields else ""
        return f"{name}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}{hint}{told}"



#| export
@dataclass(frozen=True)
class Query:
    "One question. `head`, `cue`: token ids, 1-D long; `columns`: the data set's other fields (answer, ...); `shared`: how many of head's tokens other queries begin with too."
    id: str
    prompt: str | list
    head: Tensor
    cue: Tensor
    columns: dict = field(default_factory=dict)
    shared: int = 0

    @property
    def ids(self) -> Tensor:
        "The prompt's token ids, shape [Q]."
        return torch.cat([self.head, self.cue])

    @property
    def head_segments(self) -> list[Tensor]:
        "The head in one or two non-empty runs, cut where it stops being shared."
        return [s for s in (self.head[:self.shared], self.head[self.shared:]) if len(s)]

    @property
    def segments(self) -> list[Tensor]:
        "The prompt in non-empty runs, as a prefix tree takes them."
        return [*self.head_segments, *([self.cue] if len(self.cue) else [])]


def share_heads(queries: Sequence[Query]) -> list[Query]:
    "The queries with `shared` set to the length of their heads' common beginning (worked examples, a system prompt), so that trees hold it once."
    if len(queries) < 2:
        return list(queries)
    least = min(len(q.head) for q in queries)
    heads = torch.stack([q.head[:least] for q in queries])
    alike = (heads == heads[0]).all(0).long().cumprod(0)
    return [replace(q, shared=int(alike.sum())) for q in queries]



#| export
_STAGE = dict(
    reward_G="gcpo.reward.checked_rewards", draws_G_J="gcpo.collider.integrate", paths_G="gcpo.collider.show", shown_G="gcpo.collider.show", continuations_G_J_M="gcpo.collider.continue_contexts",
    z_G_D="gcpo.collider.encode", Z_G_J_M_D="gcpo.collider.encode", adv_G="gcpo.advantage.group_advantage",
    upsilon_G="gcpo.upsilon.upsilon", weight_G="gcpo.advantage.product", old_logp_G_T="gcpo.train.remember",
    causal_ref_logp_G_T="gcpo.train.remember", ref_logp_G_T="gcpo.train.remember",
)


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Group:
    "A query's n responses and what the stages have learnt of them. Ids are 1-D long tensors without padding; `reward_G` is NaN where not scored."
    query: Query
    ids_G: tuple[Tensor, ...]                  # generated tokens of y_0..y_{n-1}, the end token included where it was reached
    completions: tuple[str, ...]               # the same as text, without the end token
    truncated_G: Tensor                        # bool: stopped by max_completion_length
    reward_G: Tensor = field(default_factory=_empty)
    reward_G_F: Tensor = field(default_factory=_empty)         # each reward function's own
    draws_G_J: tuple[tuple[Tensor, ...], ...] = ()             # y_{n,j} as context i sees it; [i][0] is y_n
    continuations_G_J_M: tuple[tuple[tuple[Tensor, ...], ...], ...] = ()
    z_G_D: Tensor = field(default_factory=_empty)
    Z_G_J_M_D: Tensor = field(default_factory=_empty)
    adv_G: Tensor = field(default_factory=_empty)
    upsilon_G: Tensor = field(default_factory=_empty)
    weight_G: Tensor = field(default_factory=_empty)           # B
    old_logp_G_T: Tensor = field(default_factory=_empty)
    ref_logp_G_T: Tensor = field(default_factory=_empty)
    causal_ref_logp_G_T: Tensor = field(default_factory=_empty)
    causal_mask_G_T: Tensor = field(default_factory=_empty)    # bool: tokens that the causal term uses
    floored_G_T: Tensor = field(default_factory=_empty)        # bool: tokens whose projected probability was not positive
    context_logp_G_J_T: Tensor = field(default_factory=_empty)  # log pi_old(y_i | c_{i,l})
    shown_G: tuple[Tensor, ...] = ()           # the responses as contexts show them (trimmed, perhaps shortened)
    shortened_G: Tensor = field(default_factory=_empty)        # bool: the context budget cut this response
    paths_G: tuple[tuple[int, ...], ...] = ()  # for each i the others, in the order in which its contexts name them

    def __len__(self) -> int:
        return len(self.ids_G)

    def to(self, device) -> "Group":
        "The group with all its tensors on a device; ids stay where they are."
        return replace(self, **{f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)})

    def need(self, *names: str) -> "Group":
        "The group itself. Raises ValueError when one of the fields is empty, naming the stage that fills it."
        for name in names:
            if len(getattr(self, name)) == 0:
                raise ValueError(f"group '{self.query.id}' has no {name}; {_STAGE.get(name, 'an earlier stage')} computes it")
        return self

    def _repr_markdown_(self) -> str:
        return group_table(self)



#| export
def group_table(group: Group) -> str:
    "A Markdown table of a group's responses: reward, A, Upsilon, B where they are known, and the text."
    columns = {"r": group.reward_G, "A": group.adv_G, "Υ": group.upsilon_G, "B": group.weight_G}
    known = {name: values for name, values in columns.items() if len(values)}
    text = lambda i: group.completions[i][:160].replace("\n", "⏎").replace("|", "\\|")
    rows = [" | ".join([str(i), *(f"{v[i]:.3g}" for v in known.values()), text(i)]) for i in range(len(group))]
    head = " | ".join(["i", *known, "response"])
    return "\n".join([f"**group `{group.query.id}`**, {len(group)} responses", "", f"| {head} |", "|---" * (len(known) + 2) + "|", *(f"| {r} |" for r in rows)])



#| export
def pad(rows: Sequence[Tensor], value: float = 0.0) -> Tensor:
    "Right-pad 1-D rows to one tensor, shape [G, T] (`T` the longest row)."
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def row_mask(rows: Sequence[Tensor]) -> Tensor:
    "Boolean [G, T]: True where `pad(rows)` holds a row's own entry."
    length_G = torch.tensor([len(r) for r in rows])
    return torch.arange(int(length_G.max()))[None, :] < length_G[:, None]



#| export
def upcast(x: Tensor) -> Tensor:
    "Tensor `x` in float32, or float64 if it already is; any shape, differentiable."
    return x.to(torch.promote_types(x.dtype, torch.float32))



#| export
class PrefixTree:
    "Token segments under parents. `parents[k]` < k or -1; `segments[k]`: non-empty 1-D long tensor."

    def __init__(self):
        self.parents: list[int] = []
        self.segments: list[Tensor] = []
        self._known: dict[tuple, int] = {}

    def add(self, parent: int, *segments: Tensor) -> int:
        "Append segments one under the other below `parent`; returns the last node. Raises ValueError for an empty segment or unknown parent."
        if not -1 <= parent < len(self.parents):
            raise ValueError(f"parent {parent} is not a node of this tree of {len(self.parents)} nodes (or -1 for a root)")
        for ids in segments:
            if ids.numel() == 0:
                raise ValueError(f"empty segment under node {parent}: a node needs at least one token")
            key = (parent, tuple(ids.tolist()))
            if key not in self._known:
                self._known[key] = len(self.parents)
                self.parents.append(parent)
                self.segments.append(ids)
            parent = self._known[key]
        return parent

    def path(self, node: int) -> list[int]:
        "Nodes from the root to `node`, itself included."
        nodes = []
        while node != -1:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def ids(self, node: int) -> Tensor:
        "The token ids of the whole root path of `node`: what a model without trees would be fed."
        return torch.cat([self.segments[k] for k in self.path(node)])

    @property
    def tokens(self) -> int:
        "Unique tokens: what a packed forward pass costs."
        return sum(len(s) for s in self.segments)



#| export
def write_atomic(path: Path, text: str) -> None:
    "Write `text` so that a reader, or a kill at any moment, sees the old file or the new one, never a part."
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def writable_dir(path: str | Path) -> Path:
    "Create a directory. Raises ValueError when it cannot be created or written to."
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".write-test").write_text("")
        (path / ".write-test").unlink()
    except OSError as error:
        raise ValueError(f"cannot write to the directory '{path}': {error.strerror}; choose another with output_dir") from None
    return path



#| export
class MetricsLog:
    "Append-only `metrics.jsonl`; each row is a dict of numbers with its `step`."

    def __init__(self, path: Path, keep_below: int = 0):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] < keep_below] if path.exists() else []
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, step: int, **values: float) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    "Rows of a `metrics.jsonl` (or of the run directory that holds it); a torn last line is left out. Raises ValueError if there is none."
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"no metrics at '{path}': is it a run directory, and has its first step ended?")
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]



#| export
def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=Path(__file__).parent if "__file__" in globals() else None, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def uncommitted() -> str:
    "The diff of the project's checkout against its commit; empty outside a checkout."
    return _git("diff", "HEAD", "--", "*.py", "*.ini", "*.yaml")


def environment() -> dict:
    "Versions, hardware, threads, git commit and a hash of uncommitted code: what a manifest records beside the configuration."
    packages = ["gcpo", "torch", "transformers", "peft", "accelerate", "datasets"]
    diff = uncommitted()
    return dict(
        python=platform.python_version(), packages={p: _installed(p) for p in packages},
        machine=platform.machine(), cpus=os.cpu_count(), threads=torch.get_num_threads(),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        git_commit=_git("rev-parse", "HEAD"), git_diff_sha256=hashlib.sha256(diff.encode()).hexdigest() if diff else "")



#| export
def data_dir() -> Path:
    "The directory of the data that comes with the project."
    here = Path(__file__).parent if "__file__" in globals() else Path.cwd().parent / "gcpo"
    return here / "data" if (here / "data").is_dir() else here.parent / "data"

