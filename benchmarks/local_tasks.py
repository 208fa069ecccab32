"""Three small tasks that need no download: source, folded and healed side by side.

    pip install '.[tasks]'
    python benchmarks/local_tasks.py tasks work/source work/converted work/finished work/healed

Writes two tasks of lm-evaluation-harness to the folder TASKS and scores the models on them with
`kvfold eval --tasks`, and on pass keys with `--needle`:

- ``package_cloze``: which of four sentences goes on with the description of a Debian package? Of
  the packages that are installed.
- ``python_tokens``: which of four operators or keywords comes next? From the standard library.

Appends to ``local_tasks.jsonl`` beside this file and prints the table.
"""

import argparse
import io
import json
import keyword
import random
import re
import subprocess
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fold_quality import machine
from kvfold.files import append_text, write_text
from kvfold.quality.request import EvalRequest
from kvfold.quality.run import check_eval, score_needles, score_tasks
from pages.quality import local_tasks

EXAMPLES, CHOICES = 200, 4
LENGTHS = (512, 2048)  # of texts with pass keys
RESULTS = Path(__file__).with_suffix(".jsonl")
_END = "\n====\n"  # of a description
_SENTENCE = re.compile(r"(?<=[a-z)][.]) (?=[A-Z])")
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def descriptions() -> Iterator[list[str]]:
    """First and second sentence of what Debian says of the packages that are installed."""
    listed = ["dpkg-query", "-W", "-f", "${Description}" + _END]
    found = subprocess.run(listed, capture_output=True, text=True, check=True)
    for description in found.stdout.split(_END):
        _, _, longer = description.partition("\n")
        text = " ".join(longer.split("\n .\n")[0].split())
        sentences = _SENTENCE.split(text)
        if len(sentences) > 1:
            yield sentences[:2]


def cloze(draw: random.Random) -> list[dict[str, Any]]:
    """The first sentence, and four that may be the second: its own, and others' second ones."""
    pairs = sorted({second: first for first, second in descriptions()}.items())
    questions = []
    for second, first in draw.sample(pairs, min(EXAMPLES, len(pairs))):
        others = [other for other, _ in draw.sample(pairs, CHOICES) if other != second]
        choices = [second, *others[: CHOICES - 1]]
        questions.append(_question(first, [f" {choice}" for choice in choices], draw))
    return questions


def token_questions(draw: random.Random) -> list[dict[str, Any]]:
    """Up to 30 lines of the standard library, cut before an operator or a keyword."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 8192)
    questions: list[dict[str, Any]] = []
    while len(questions) < EXAMPLES:
        text = draw.choice(files).read_text(encoding="utf-8")
        places = _tokens(text)
        if not places:
            continue
        line, column, right = draw.choice(places)
        lines = text.splitlines(keepends=True)
        before = "".join(lines[max(0, line - 30) : line - 1]) + lines[line - 1][:column]
        kind = keyword.iskeyword(right)
        others = sorted({word for *_, word in places if keyword.iskeyword(word) == kind} - {right})
        if len(others) >= CHOICES - 1:
            space = " " if before.endswith(" ") else ""
            choices = [space + word for word in (right, *draw.sample(others, CHOICES - 1))]
            questions.append(_question(before.removesuffix(" "), choices, draw))
    return questions


@cache
def _tokens(text: str) -> list[tuple[int, int, str]]:
    """Line, column and word of operators and keywords behind the beginning of a line."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        operator = token.type == tokenize.OP and token.string not in "()[]{},:.;"
        if operator or (token.type == tokenize.NAME and keyword.iskeyword(token.string)):
            line, column = token.start
            if token.line[:column].strip() and line > 10:
                found.append((line, column, token.string))
    return found


def _question(context: str, choices: list[str], draw: random.Random) -> dict[str, Any]:
    """The first of the choices is right; they are shuffled."""
    order = draw.sample(range(len(choices)), len(choices))
    shuffled = [choices[place] for place in order]
    return {"context": context, "choices": shuffled, "answer": order.index(0)}


TASKS = {"package_cloze": cloze, "python_tokens": token_questions}


def write_tasks(folder: Path) -> None:
    """The same questions on machines with the same packages and the same Python."""
    for name, make in TASKS.items():
        file = folder / f"{name}.jsonl"
        lines = [json.dumps(question) + "\n" for question in make(random.Random(name))]
        write_text(file, "".join(lines), force=True)
        task = _TASK.format(name=name, file=json.dumps(str(file.resolve())))
        write_text(folder / f"{name}.yaml", task, force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("models", type=Path, nargs="+", help="the source first")
    parser.add_argument("--limit", type=int, help="questions of each task, to try it")
    arguments = parser.parse_args()
    arguments.tasks.mkdir(parents=True, exist_ok=True)
    write_tasks(arguments.tasks)
    source, *others = map(str, arguments.models)
    request = EvalRequest.asked(
        source=source, others=others, tasks=list(TASKS), task_folder=str(arguments.tasks),
        lengths=LENGTHS, limit=arguments.limit, dtype="bfloat16",
    )  # fmt: skip
    check_eval(request)
    rows = [
        {
            "what": score.task,
            "name": Path(score.name).name,
            "value": score.value,
            "error": score.error,
        }
        for score in score_tasks(request)
        if score.metric == ("acc_norm" if score.task == "package_cloze" else "acc")
    ]
    found = score_needles(request)
    for length in LENGTHS:
        for name in dict.fromkeys(each.name for each in found):
            own = [each.found for each in found if (each.name, each.tokens) == (name, length)]
            what = f"pass keys, {length:,} tokens"
            value = sum(own) / len(own)
            rows.append({"what": what, "name": Path(name).name, "value": value, "error": None})
    stamp = {"benchmark": "local_tasks", **machine()}
    lines = [json.dumps({**stamp, "limit": arguments.limit, **row}) + "\n" for row in rows]
    append_text(RESULTS, "".join(lines))
    print(local_tasks())


if __name__ == "__main__":
    main()
