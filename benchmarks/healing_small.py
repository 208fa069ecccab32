"""The GQA paper's figures, small: uptraining, initialisation and the number of KV heads.

    kvfold demo --out demo                               # trains the MHA source
    python benchmarks/healing_small.py demo work         # about 15 minutes on 2 cores

The paper (arXiv 2305.13245, figures 4 to 6) uptrains T5 from averaged, first or random KV
heads. Here the source is the model that `kvfold demo` trains (8 KV heads, 921,600 training
tokens); it is folded by `random`, `first`, `mean` and `auto`, and healed for a share α of those
tokens, all weights, towards the source's predictions (and a fifth of the loss towards the next
token) on the very text it was trained on.
Perplexities are of topics that neither training nor healing has seen. Appends to
``healing_small.jsonl`` and draws ``healing_small.png`` beside this file.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from fold_quality import machine
from kvfold import convert, evaluate, heal
from kvfold.demo.text import split_topics
from kvfold.demo.training import CONTEXT
from kvfold.files import write_text
from kvfold.quality.text import python_topics
from kvfold.report.picture import save

METHODS = ("random", "first", "mean", "auto")
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
KV_HEADS = (1, 2, 4)
MAIN_SHARE = 0.05
BATCH_SEQUENCES = 1
RATE = 1e-3
CROSS_ENTROPY = 0.2
HELD_OUT = 4096  # of which a quarter decides how much of what training changed is kept
RESULTS = Path(__file__).with_suffix(".jsonl")


def training_text(folder: Path) -> Path:
    """The topics that the demo trains on, one document each."""
    path = folder / "training.jsonl"
    topics = split_topics(python_topics()).training.values()
    write_text(path, "".join(json.dumps({"text": topic}) + "\n" for topic in topics))
    return path


def fold(demo: Path, work: Path, method: str, kv_heads: int) -> Path:
    """The source folded by one method, closed form only but for ``auto``."""
    out = work / f"{method}-{kv_heads}"
    if not out.exists():
        calibration = [demo / "calibration.txt"] if method == "auto" else None
        convert(demo / "source", out, kv_heads, method=method, calibration=calibration,
                calibration_tokens=96 * CONTEXT, context=CONTEXT)  # fmt: skip
    return out


def healed(folded: Path, demo: Path, text: Path, tokens: int, work: Path) -> Path:
    """``folded`` after ``tokens`` tokens; itself for none."""
    if not tokens:
        return folded
    out = work / f"{folded.name}-{tokens}"
    shutil.rmtree(out, ignore_errors=True)
    heal(
        folded, out, demo / "source", [text], stages=["kl"], tokens=tokens, context=CONTEXT,
        batch_tokens=BATCH_SEQUENCES * CONTEXT, micro_batch=BATCH_SEQUENCES, train="all", lr=RATE,
        lr_rest=0.3 * RATE, cross_entropy=CROSS_ENTROPY, held_out_tokens=HELD_OUT, eval_texts=[],
        force=True,
    )  # fmt: skip
    return out


def cases() -> list[tuple[str, int, float]]:
    """Every method over α at one KV head; mean and auto over the number of heads at 5%."""
    rows = [(method, 1, share) for method in METHODS for share in SHARES]
    more = [(m, heads, share) for m in ("mean", "auto") for heads in KV_HEADS[1:]
            for share in (0.0, MAIN_SHARE)]  # fmt: skip
    return rows + more


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    demo, work = arguments.demo, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    total = json.loads((demo / "demo.json").read_text())["training_tokens"]
    text = training_text(work)
    rows: list[dict[str, Any]] = []
    for method, kv_heads, share in cases():
        folded = fold(demo, work, method, kv_heads)
        model = healed(folded, demo, text, round(share * total), work)
        source, own = evaluate([demo / "source", model], [demo / "held-out.txt"], context=CONTEXT)
        rows.append({
            **machine(), "method": method, "kv_heads": kv_heads, "share": share,
            "perplexity": own.perplexity, "source": source.perplexity, "ratio": own.ratio,
            "ratio_error": own.ratio_error, "kl": own.kl,
        })  # fmt: skip
        print(f"{method:8} {kv_heads} KV heads, {share:6.1%}: perplexity {own.perplexity:8.3f}, "
              f"{own.ratio:.4f} ± {own.ratio_error:.4f} of the source's", flush=True)  # fmt: skip
    write_text(RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, RESULTS.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels: over α, method by method; over the number of KV heads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    styles = dict(zip(METHODS, [("#CC79A7", "D"), ("#E69F00", "s"), ("#D55E00", "^"),
                                ("#0072B2", "o")], strict=True))  # fmt: skip
    for method, (colour, marker) in styles.items():
        own = [row for row in rows if row["method"] == method and row["kv_heads"] == 1]
        left.plot([100 * row["share"] for row in own], [row["ratio"] for row in own],
                  color=colour, marker=marker, label=method)  # fmt: skip
    left.set(yscale="log", xlabel="healing tokens, % of training tokens",
             ylabel="perplexity / source's", title="8 → 1 KV heads")  # fmt: skip
    for method in ("mean", "auto"):
        colour, marker = styles[method]
        for share, dashes in ((0.0, ":"), (MAIN_SHARE, "-")):
            points = sorted(
                (row["kv_heads"], row["ratio"])
                for row in rows
                if row["method"] == method and row["share"] == share
            )
            right.plot(*zip(*points, strict=True), dashes, color=colour, marker=marker,
                       label=f"{method}, {share:.0%}")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="KV heads (of 8)",
              title="before and after healing")  # fmt: skip
    right.set_xticks(KV_HEADS, [str(heads) for heads in KV_HEADS])
    for axes in (left, right):
        ticks = [1, 1.1, 1.2, 1.5, 2, 3]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.axhline(1, color="#666666", linewidth=1)
        axes.grid(axis="y", color="#dddddd")
        axes.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
