"""``kvfold demo``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvfold import numbers
from kvfold.cli.options import NewFolder, Number
from kvfold.cli.output import say
from kvfold.names import json_text

if TYPE_CHECKING:
    from kvfold.demo.result import DemoResult


@click.command("demo")
@click.option(
    "--out",
    default="kvfold-demo",
    show_default=True,
    type=NewFolder(),
    help="Folder for the model, the texts, the numbers and the plot.",
)
@click.option("--seed", type=Number(numbers.SEED), default=0, show_default=True,
              help="Of training and folding.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
def command(out: Path, seed: int, force: bool, as_json: bool) -> None:
    """Train a small model here, fold it, and plot what that costs.

    Takes two to six minutes on two CPU cores. Needs no GPU and no network: the text is
    Python's own documentation. OUT/source is a model to try the other commands on.
    """
    from kvfold.demo.run import check_out

    check_out(out, force)

    from kvfold.cli.progress import progress_bar
    from kvfold.demo.run import run_demo

    with progress_bar() as progress:
        result = run_demo(out, seed, force, progress)
    if as_json:
        click.echo(json_text(result.as_dict()))
    else:
        _print(result)
    say(f"plot: {result.plot} (and .svg)", err=True)
    say(f"next: kvfold inspect {result.source}", err=True)


def _print(result: "DemoResult") -> None:
    from kvfold.report.tables import count, print_table, size

    columns = ("cached", "method", "KV/token", "perplexity", "nats lost", "top-1")
    rows = [
        (
            row.cached,
            row.method,
            size(row.quality.kv_bytes_per_token),
            f"{row.quality.perplexity:.2f} ± {row.quality.perplexity_error:.2f}",
            f"{row.quality.nats_lost:.3f} ± {row.quality.nats_lost_error:.3f}",
            f"{row.quality.top1:.1%}",
        )
        for row in result.rows
    ]
    caption = (
        f"{count(result.parameters)} parameters, trained on {count(result.training_tokens)} tokens "
        f"of Python's documentation, seed {result.seed}; "
        f"{result.rows[0].quality.tokens:,} held-out tokens. "
        "KV/token: bytes of KV cache (f16); top-1: agreement with the source; ±: one standard error"
    )
    print_table("Folding 8 KV heads", columns, rows, caption)
