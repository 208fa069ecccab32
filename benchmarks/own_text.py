"""What text to calibrate on: a manual, what the model writes, half of each, or what kvfold brings.

    python benchmarks/own_text.py texts work

Folds SmolLM2-135M-Instruct from 3 to 1 KV heads with the defaults of `kvfold convert`, on the
Debian handbook's chapters, on `--calibration self`, on both, and on the small text that is built
in, at most 50,000 tokens each (or `--calibration-tokens`), and scores all on text of three kinds:
held-out chapters, Python's language reference, and source code of its standard library. Appends to
``own_text.jsonl`` beside this file and prints the table. Models that are in WORK already are not
converted again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fold_quality import machine, source_folder
from kvfold import convert, evaluate
from kvfold.files import append_text
from kvfold.fold.request import SELF

TEXTS = ("handbook", "documentation", "code")
CASES = {
    "handbook": ("calibration",),
    "self": (SELF,),
    "both": ("calibration", SELF),
    "built-in": (),
}
RESULTS = Path(__file__).with_suffix(".jsonl")


def fold(source: Path, work: Path, texts: Path, name: str, tokens: int) -> Path:
    """Convert, unless it is done."""
    out = work / f"text-{name}-{tokens}"
    if not out.exists():
        files = [SELF if text == SELF else texts / f"{text}.txt" for text in CASES[name]]
        convert(source, out, 1, calibration=files or None, calibration_tokens=tokens)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--calibration-tokens", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=20_480, help="per text, in windows of 512")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = source_folder(arguments.work)
    models = [
        fold(source, arguments.work, arguments.texts, name, arguments.calibration_tokens)
        for name in arguments.only
    ]
    files = [arguments.texts / f"{name}.txt" for name in TEXTS]
    scores = evaluate([source, *models], files, max_tokens=arguments.tokens)
    for name, model in zip(arguments.only, models, strict=True):
        record: dict[str, Any] = json.loads((model / "kvfold.json").read_text(encoding="utf-8"))
        own = [score.as_dict() for score in scores if score.name == str(model)]
        line = {
            "benchmark": "own_text", "text": name, **machine(), "command": record["command"],
            "run": record["run"], "calibration_tokens": record["calibration"]["tokens"],
            "computed": record.get("computed"), "held_out": record["held_out"], "scores": own,
        }  # fmt: skip
        append_text(RESULTS, json.dumps(line) + "\n")
        lost = " / ".join(
            f"{each['nats_lost']:.2f} ± {each['nats_lost_error']:.2f}" for each in own
        )
        print(f"{name}: {lost}")


if __name__ == "__main__":
    main()
