"""``kvfold heal``"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfold import numbers
from kvfold.cli.options import Location, NewFolder, Number, Source
from kvfold.cli.output import emit, say
from kvfold.cli.signals import resumable
from kvfold.numbers import parts

if TYPE_CHECKING:
    from kvfold.checkpoint.workspace import Workspace
    from kvfold.healing.request import HealRequest
    from kvfold.healing.watch import Watch
    from kvfold.progress import Progress


@click.command("heal")
@click.argument("folded", metavar="FOLDED", type=Source())
@click.argument("out", metavar="OUT", type=NewFolder())
@click.option(
    "--teacher", type=Source(), required=True, metavar="SOURCE", help="What FOLDED was folded from."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="NAME[=WEIGHT]",
    help="Text to train on: a plain text, .jsonl or .parquet file, or a dataset's name; "
    "repeatable, sequences are drawn by weight.",
)
@click.option(
    "--tokens", type=Number(numbers.TOKENS), default="10M", show_default=True, help="Of stage kl."
)
@click.option(
    "--stages", metavar="local,kl", help="[default: kl; local,kl if FOLDED had no local fit]"
)
@click.option("--context", type=Number(numbers.WINDOW), help="Tokens per sequence.  [default: 512]")
@click.option(
    "--batch-tokens",
    type=Number(numbers.TOKENS),
    default="4096",
    show_default=True,
    help="Per update.",
)
@click.option(
    "--micro-batch",
    type=Number(numbers.MICRO_BATCH),
    help="Sequences at once and process.  [default: 1]",
)
@click.option("--train", type=click.Choice(["attention", "all"]), default="attention",
              show_default=True)  # fmt: skip
@click.option(
    "--lr",
    type=Number(numbers.RATE),
    default=5e-5,
    show_default=True,
    help="Peak rate of attention.",
)
@click.option(
    "--lr-rest",
    type=Number(numbers.RATE),
    default=1e-5,
    show_default=True,
    help="Of all else, with --train all.",
)
@click.option(
    "--warm-up",
    type=Number(numbers.FRACTION),
    default=0.05,
    show_default=True,
    help="Fraction of the steps.",
)
@click.option(
    "--clip",
    type=Number(numbers.CLIP),
    default=1.0,
    show_default=True,
    help="Gradient norm; 0 for none.",
)
@click.option(
    "--temperature",
    type=Number(numbers.TEMPERATURE),
    default=1.0,
    show_default=True,
    help="Of the divergence.",
)
@click.option(
    "--cross-entropy",
    type=Number(numbers.FRACTION),
    default=0.0,
    show_default=True,
    help="Its share of the loss, 0 to 1.",
)
@click.option(
    "--hidden",
    type=Number(numbers.WEIGHT),
    default=0.0,
    show_default=True,
    help="Weight of the hidden states.",
)
@click.option(
    "--lora-rank",
    type=Number(numbers.LORA_RANK),
    default=0,
    show_default=True,
    help="Train LoRA, merged at the end.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, a third slower.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]),
    help="To compute in; weights are float32.  [default: bfloat16 on a GPU]",
)  # fmt: skip
@click.option("--parallel", type=click.Choice(["ddp", "fsdp"]),
              help="Under torchrun.  [default: fsdp on GPUs, ddp on CPUs]")  # fmt: skip
@click.option("--device", help="torch device.  [default: a GPU if there is one]")
@click.option("--local-tokens", type=Number(numbers.CALIBRATION), default="50k", show_default=True,
              help="Of stage local.")  # fmt: skip
@click.option("--held-out-tokens", type=Number(numbers.HELD_OUT), default="16k", show_default=True,
              help="Kept from training, to evaluate on.")  # fmt: skip
@click.option(
    "--eval-text", "eval_texts", type=Location(), multiple=True, metavar="FILE",
    help="Another kind of text, to evaluate on.  [default: Python's documentation]",
)  # fmt: skip
@click.option(
    "--eval-tokens", type=Number(numbers.TOKENS), help="Evaluate every N.  [default: a tenth]"
)
@click.option(
    "--save-tokens", type=Number(numbers.TOKENS), help="Checkpoint every N.  [default: a tenth]"
)
@click.option(
    "--keep",
    type=Number(numbers.KEEP),
    default=2,
    show_default=True,
    help="Checkpoints kept meanwhile.",
)
@click.option("--seed", type=Number(numbers.SEED), default=0, show_default=True)
@click.option("--tensorboard", type=Location(), metavar="FOLDER", help="Write to TensorBoard too.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    folded: str,
    out: Path,
    teacher: str,
    texts: tuple[str, ...],
    stages: str | None,
    eval_texts: tuple[Path, ...],
    tensorboard: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train FOLDED towards SOURCE and write it to OUT.

    Stage local fits layer by layer; stage kl minimises the divergence of the whole model's
    predictions from the source's. Under `torchrun ... -m kvfold heal ...` many processes share
    the work. Ctrl-C saves a checkpoint; --resume goes on from it.
    """
    from kvfold.healing.request import make_heal_request

    request = make_heal_request(
        folded,
        teacher,
        texts,
        stages=None if stages is None else parts(stages, "--stages"),
        eval_texts=eval_texts or None,
        **options,
    )
    heal_and_show(
        request, out, resume=resume, force=force, as_json=as_json, tensorboard=tensorboard
    )


def heal_and_show(
    request: "HealRequest",
    out: Path,
    *,
    resume: bool,
    force: bool,
    as_json: bool,
    tensorboard: Path | None = None,
    work: "Workspace | None" = None,
) -> None:
    """Check, heal with bars, print the record."""
    from kvfold.healing.request import check_heal

    check_heal(request, out, force=force, resume=resume)
    from kvfold.checkpoint.places import working_folder
    from kvfold.healing.parallel import launched_rank
    from kvfold.healing.run import run_heal
    from kvfold.healing.watch import tensorboard as write_tensorboard

    also = write_tensorboard(tensorboard) if tensorboard else None
    with resumable(lambda: working_folder(out)), healing_display(also) as (progress, watch):
        record = run_heal(
            request, out, resume=resume, force=force,
            progress=progress, watch=watch, draw=draw, work=work,
        )  # fmt: skip
    if launched_rank() == 0:
        emit(as_json, record, lambda: print_healed(record, out))


def draw(folder: Path) -> None:
    """Put the curve of the run beside its metrics."""
    from kvfold.healing.record import METRICS
    from kvfold.healing.watch import read_metrics
    from kvfold.report.healing import plot_healing

    if (folder / METRICS).is_file():
        plot_healing(read_metrics(folder / METRICS), folder / "healing.png")


@contextmanager
def healing_display(also: "Watch | None") -> "Iterator[tuple[Progress, Watch]]":
    """Bars with the latest loss on a terminal; a line per evaluation everywhere."""
    from kvfold.cli.progress import progress_bar

    with progress_bar() as progress:
        latest = {"words": ""}

        def watch(row: dict[str, Any]) -> None:
            if also is not None:
                also(row)
            if "kl" in row:
                rate = f"{row['tokens_per_second']:,.0f} tokens/s"
                latest["words"] = f"KL {row['kl']:.3f}  {rate}"
            scores = {name: value for name, value in row.items() if name.startswith("kl ")}
            if scores:
                words = ", ".join(f"{name[3:]} {value:.4f}" for name, value in scores.items())
                say(f"{row['tokens']:>12,} tokens  KL: {words}", err=True)

        def show(label: str, done: int, total: int) -> None:
            progress(label, done, total, latest["words"] if label == "healing" else "")

        yield show, watch


def print_healed(record: dict[str, Any], out: Path) -> None:
    """What healing gained, text by text."""
    from kvfold.quality.scores import Quality
    from kvfold.report.quality import print_quality
    from kvfold.report.tables import print_table, size

    heal = record["heal"]
    names = [field.name for field in fields(Quality)]
    print_quality([Quality(**{name: row[name] for name in names}) for row in heal["quality"]])
    rows = [(f"layer error, {name.replace('_', ' ')}",
             f"{stage['error_before']:.3f} -> {stage['error_after']:.3f}")
            for name, stage in heal.get("local", {"summary": {}})["summary"].items()]  # fmt: skip
    run = heal["run"]
    rows += [
        ("updates", f"{heal['steps']:,}"),
        ("peak memory", size(run.get("peak_memory_bytes", 0))),
        ("time", f"{run['seconds']:.0f} s"),
    ]
    print_table(f"Healed: {out}", ["", ""], rows)
