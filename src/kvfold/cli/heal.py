"""``kvfold heal``"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfold.cli.options import Location, NewFolder
from kvfold.cli.output import emit, say
from kvfold.cli.parse import asks
from kvfold.cli.signals import resumable
from kvfold.healing.request import HealRequest
from kvfold.record import METRICS

if TYPE_CHECKING:
    from kvfold.checkpoint.workspace import Workspace
    from kvfold.healing.watch import Watch
    from kvfold.progress import Progress


@click.command("heal")
@asks(HealRequest)
@click.argument("out", metavar="OUT", type=NewFolder())
@click.option("--tensorboard", type=Location(), metavar="FOLDER", help="Write to TensorBoard too.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    request: HealRequest,
    out: Path,
    tensorboard: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Train FOLDED towards SOURCE and write it to OUT.

    Stage local fits layer by layer; stage kl minimises the divergence of the whole model's
    predictions from the source's. Under `torchrun ... -m kvfold heal ...` many processes share
    the work. Ctrl-C saves a checkpoint; --resume goes on from it.
    """
    heal_and_show(
        request, out, resume=resume, force=force, as_json=as_json, tensorboard=tensorboard
    )


def heal_and_show(
    request: HealRequest,
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
    from kvfold.healing.run import run_heal
    from kvfold.healing.watch import tensorboard as write_tensorboard
    from kvfold.quality.launched import launched_rank

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
    share = heal.get("kept", {"share": 1.0})["share"]
    if share == 0.0:
        rows += [("kept", "nothing of it: FOLDED does better; try more --tokens, a lower --lr")]
    elif share != 1.0:
        rows += [("kept", f"{share:.0%} of what training changed, the best on held-out text")]
    rows += [
        ("updates", f"{heal['steps']:,}"),
        ("peak memory", size(run.get("peak_memory_bytes", 0))),
        ("time", f"{run['seconds']:.0f} s"),
    ]
    print_table(f"Healed: {out}", ["", ""], rows)
