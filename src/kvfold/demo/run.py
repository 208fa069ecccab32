"""``kvfold demo``: train a small MHA model on Python's own documentation, fold it, measure it.

Everything it needs is on the machine already: the text is ``pydoc_data.topics``, which ships
with Python, and the model is trained here in a minute or three, on the CPU. No torch at import.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint import places
from kvfold.checkpoint.workspace import opened
from kvfold.demo.result import SOURCE, DemoResult, DemoRow
from kvfold.demo.text import Splits, joined
from kvfold.demo.training import BATCH, CONTEXT, STEPS, train_demo_model
from kvfold.errors import InputError
from kvfold.files import write_json, write_text
from kvfold.fold.methods import AUTO
from kvfold.progress import Progress, no_progress
from kvfold.quality.scores import compare
from kvfold.quality.text import Tokenizer, token_windows
from kvfold.record import DEMO

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDED_KV_HEADS = (4, 2, 1)
# Label, method, fit: the GQA paper's baseline; better algebra alone; algebra and fitting.
FOLDS = (
    ("mean", "mean", "none"),
    ("auto, no fit", AUTO, "none"),
    ("auto", AUTO, "local"),
)
# As many numbers as 4, 2, 1.5 and 1 heads: a latent, and half the rotary frequencies for all heads.
# Stored with biases: so small a model has no direction in which all of its inputs are alike.
LATENTS = ("120+8", "56+8", "40+8", "24+8")
LATENT = "latent"
_CALIBRATION_TOKENS = 96 * CONTEXT
_HELD_OUT_TOKENS = 128 * CONTEXT


def run_demo(
    out: Path, seed: int = 0, force: bool = False, progress: Progress = no_progress
) -> DemoResult:
    """Train, fold to 4, 2 and 1 KV heads and to latents as large, evaluate and plot.

    ``out`` appears when all is done: the source model, the texts, ``demo.json``, the plot.

    Raises:
        InputError: if ``out`` exists and ``force`` is false.

    >>> run_demo(Path("kvfold-demo")).rows[0].kv_heads  # doctest: +SKIP
    8
    """
    from kvfold.demo.plots import plot_demo

    check_out(out, force)
    with opened(out, older=DEMO) as work:
        work.start({}, force=force)
        work.begin({})
        model, tokenizer, splits = train_demo_model(seed, progress, STEPS)
        rows = fold_and_compare(model, tokenizer, splits, seed, progress)
        result = DemoResult(rows, seed, model.num_parameters(), STEPS * BATCH * CONTEXT, out)
        folder = work.new
        model.save_pretrained(folder / SOURCE)
        tokenizer.save_pretrained(folder / SOURCE)
        for path, topics in (
            (result.calibration, splits.calibration),
            (result.held_out, splits.held_out),
        ):
            write_text(folder / path.name, joined(topics))
        write_json(folder / DEMO, result.as_dict())
        plot_demo(result.rows, folder / result.plot.name, seed)
        work.publish()
    return result


def check_out(out: Path, force: bool) -> None:
    """Refuse to overwrite, and to work towards a folder that cannot be made.

    Raises:
        InputError: naming the folder.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists already", "name another folder with --out, or add --force")
    if out.exists() and not (out / DEMO).is_file():
        raise InputError(
            f"{out} is not a folder of an earlier demo; --force replaces only those",
            "name another folder with --out",
        )
    places.check_out(out, (), force, older=DEMO)


def fold_and_compare(
    model: "PreTrainedModel", tokenizer: Tokenizer, splits: Splits, seed: int, progress: Progress
) -> tuple[DemoRow, ...]:
    """Fold by every method to all numbers of heads, and to latents; score on held-out text."""
    from kvfold.fold.model import fold_model

    windows = token_windows(tokenizer, joined(splits.calibration), CONTEXT, _CALIBRATION_TOKENS)
    heads = int(model.config.num_key_value_heads)
    found: list[tuple[int, str, str | None, Any]] = [(heads, SOURCE, None, model)]
    total = len(FOLDED_KV_HEADS) * len(FOLDS) + len(LATENTS)
    for kv_heads in FOLDED_KV_HEADS:
        for label, method, fit in FOLDS:
            data = windows if method == AUTO else None  # averaging looks at weights only
            folded = fold_model(model, kv_heads, method, fit, data, seed)
            found.append((kv_heads, label, None, folded.model))
            progress("folding", len(found) - 1, total)
    for words in LATENTS:
        folded = fold_model(model, latent=words, layout="youtu", windows=windows, seed=seed)
        found.append((heads, LATENT, words, folded.model))
        progress("folding", len(found) - 1, total)
    held_out = token_windows(tokenizer, joined(splits.held_out), CONTEXT, _HELD_OUT_TOKENS)
    labelled = [(f"{label} {latent or kv}", each) for kv, label, latent, each in found]
    qualities = compare(labelled, held_out, "held-out topics", progress)
    return tuple(
        DemoRow(kv_heads, label, quality, latent)
        for (kv_heads, label, latent, _), quality in zip(found, qualities, strict=True)
    )
