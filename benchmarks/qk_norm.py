"""What QK-norm costs a fold: the demo's model with it and without, folded alike.

    python benchmarks/qk_norm.py work            # about 10 minutes on 2 cores

Two models of the demo's sizes and recipe, Qwen 3's architecture, which normalises queries and keys
head by head, and Llama's, which does not, are trained on the same text (8 KV heads), folded to 4, 2
and 1, in closed form and fitted, and scored on topics that neither training nor calibration has
seen. Appends to ``qk_norm.jsonl`` beside this file.
"""

import argparse
import json
from pathlib import Path

from fold_quality import machine
from kvfold import convert, evaluate
from kvfold.demo.text import END
from kvfold.demo.training import CONTEXT, train_demo_model
from kvfold.files import append_text, write_text
from pages.quality import qk_norm

KV_HEADS, FITS = (4, 2, 1), ("none", "local")
CALIBRATION, SCORED = "calibration.txt", "held-out.txt"
RESULTS = Path(__file__).with_suffix(".jsonl")


def train(work: Path, name: str) -> Path:
    """The source of that name, unless it is there; and the texts."""
    source = work / name
    if not source.exists():
        model, tokenizer, splits = train_demo_model(qk_norm=name == "qk-norm")
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        write_text(work / CALIBRATION, END.join(splits.calibration.values()))
        write_text(work / SCORED, END.join(splits.held_out.values()))
    return source


def fold(work: Path, source: Path, heads: int, fit: str) -> Path:
    """The source folded so, unless it is there."""
    out = work / f"{source.name}-{heads}-{fit}"
    if not out.exists():
        convert(
            source, out, heads, fit=fit, calibration=[work / CALIBRATION], context=CONTEXT,
            dtype="float32",
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    work: Path = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    for name in ("plain", "qk-norm"):
        source = train(work, name)
        cases = [(heads, fit) for fit in FITS for heads in KV_HEADS]
        folded = [fold(work, source, *case) for case in cases]
        scores = evaluate([source, *folded], [work / SCORED], context=CONTEXT)
        for (heads, fit), score in zip(cases, scores[1:], strict=True):
            kept = {key: getattr(score, key) for key in ("nats_lost", "nats_lost_error", "kl")}
            row = {"model": name, "num_kv_heads": heads, "fit": fit, **kept, **machine()}
            append_text(RESULTS, json.dumps({"benchmark": "qk_norm", **row}) + "\n")
    print(qk_norm())


if __name__ == "__main__":
    main()
