
#| export
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence

import torch

from gcpo.core import Query, choose, derive_seed



#| export
@dataclass(frozen=True)
class Row:
    "A question. `prompt` is a string (then followed by `cue`) or chat messages; `columns` go to the reward functions."
    id: str
    prompt: str | list
    cue: str = ""
    columns: dict = field(default_factory=dict)



#| export
def largest_of_three(rng: random.Random) -> tuple[str, str, str]:
    "Question, cue and answer: the largest of three different two-digit numbers."
    numbers = rng.sample(range(10, 100), 3)
    return f"Numbers: {numbers[0]} {numbers[1]} {numbers[2]}\n", "Largest:", str(max(numbers))


def addition(rng: random.Random) -> tuple[str, str, str]:
    "Question, cue and answer: the sum of two numbers below twenty."
    a, b = rng.randrange(1, 20), rng.randrange(1, 20)
    return f"Numbers: {a} {b}\n", "Sum:", str(a + b)


TASKS: dict[str, Callable] = {"largest_of_three": largest_of_three, "addition": addition}



#| export
def is_held_out(question: str) -> bool:
    "Whether a generated question is on the held-out side (one in five, by the hash of its text)."
    return derive_seed("split", question) % 5 == 0


def generated_rows(task: str, count: int, seed: int = 0, held_out: bool = False, shots: int = 0) -> list[Row]:
    """`count` different rows of a generated task, each after the same `shots` worked examples.

    Raises ValueError for an unknown task, and when the task has fewer different questions than asked for."""
    make, rng = choose(task, TASKS, "task"), random.Random(derive_seed("data", task, seed, held_out))
    examples = _examples(make, shots)
    rows, seen, tries = [], set(), 0
    while len(rows) < count:
        question, cue, answer = make(rng)
        tries += 1
        if tries > 1000 + 200 * count:
            raise ValueError(f"task '{task}' has only {len(rows)} different {'held-out' if held_out else 'training'} questions, {count} were asked for")
        if question not in seen and is_held_out(question) == held_out:
            seen.add(question)
            rows.append(Row(f"{task}-{len(rows)}", examples + question, cue, {"answer": answer}))
    return rows


def _examples(make: Callable, shots: int) -> str:
    rng, text, used = random.Random(derive_seed("shots")), "", set()
    while len(used) < shots:
        question, cue, answer = make(rng)
        if question not in used and not is_held_out(question):
            used.add(question)
            text += f"{question}{cue} {answer}\n\n"
    return text



#| export
def read_jsonl(path: str | Path) -> list[dict]:
    "Objects of a JSON-lines file. Raises ValueError (file and line) when it is missing, empty, or a line is no JSON object."
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file '{path}' does not exist (the working directory is '{Path.cwd()}')")
    objects = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}): {line[:60]!r}") from None
        if not isinstance(objects[-1], dict):
            raise ValueError(f"{path}:{number}: expected a JSON object with a prompt, found {line[:60]!r}")
    if not objects:
        raise ValueError(f"data file '{path}' is empty: it needs at least one line such as {{\"prompt\": ..., \"answer\": ...}}")
    return objects



#| export
_QUESTION_FIELDS = ("prompt", "problem", "question")


def file_rows(path: str | Path) -> list[Row]:
    "Rows of a JSON-lines file. A `problem` or `question` becomes a chat message of the user. Raises ValueError with file and line."
    rows = []
    for number, item in enumerate(read_jsonl(path), 1):
        name = next((f for f in _QUESTION_FIELDS if f in item), None)
        if name is None:
            raise ValueError(f"{path}: object {number} has none of the fields {', '.join(_QUESTION_FIELDS)}; it has {', '.join(item) or 'nothing'}")
        prompt = item[name]
        if not (isinstance(prompt, str) and prompt.strip() or isinstance(prompt, list) and prompt):
            raise ValueError(f"{path}: object {number}: '{name}' must be a non-empty string or a list of messages, not {prompt!r}")
        if name != "prompt":
            prompt = [{"role": "user", "content": prompt}]
        columns = {k: v for k, v in item.items() if k not in (name, "id")}
        rows.append(Row(str(item.get("id", number)), prompt, columns=columns))
    return rows



#| export
def load_rows(data: str, eval_data: str = "", train_size: int = 1000, eval_size: int = 100, seed: int = 0, shots: int = 0) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows of a task or a `.jsonl` file (`train_size` concerns generated tasks alone).

    Raises ValueError for an unknown task, a faulty file, or a question that stands on both sides."""
    if data in TASKS:
        train = generated_rows(data, train_size, seed, shots=shots)
        held_out = generated_rows(data, eval_size, held_out=True, shots=shots) if not eval_data else file_rows(eval_data)[:eval_size]
    elif data.endswith((".jsonl", ".json")):
        train = file_rows(data)
        cut = max(1, len(train) // 5)
        train, held_out = (train, file_rows(eval_data)) if eval_data else (train[:-cut], train[-cut:])
        held_out = held_out[:eval_size]
    else:
        choose(data, {**TASKS, "<path>.jsonl": None}, "data set")
    if not train:
        raise ValueError(f"data '{data}' leaves no training row beside the held-out ones: give eval_data, or a file of two rows at least")
    both = {json.dumps(r.prompt) for r in train} & {json.dumps(r.prompt) for r in held_out}
    if both:
        raise ValueError(f"{len(both)} question(s) stand in the training and in the held-out rows, for example {next(iter(both))[:80]}: remove them from one side")
    return train, held_out



#| export
_MARK = "\u241fHERE\u241f"


def to_query(row: Row, tokenizer) -> Query:
    "A row in ids. Raises ValueError for chat messages that do not end with the user's, or a tokenizer without a chat template."
    encode = lambda text: torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    if isinstance(row.prompt, str):
        return Query(row.id, row.prompt + row.cue, encode(row.prompt), encode(row.cue), row.columns)
    if not tokenizer.chat_template:
        raise ValueError(f"row '{row.id}' has chat messages, but this model has no chat template: give string prompts in a field `prompt`")
    if row.prompt[-1].get("role") != "user":
        raise ValueError(f"row '{row.id}': the last message must be the user's, not the {row.prompt[-1].get('role')}'s")
    marked = [*row.prompt[:-1], {"role": "user", "content": row.prompt[-1]["content"] + _MARK}]
    head, cue = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True).split(_MARK)
    return Query(row.id, row.prompt, encode(head), encode(cue), row.columns)

