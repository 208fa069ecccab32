"""``kvfold report``"""

from pathlib import Path

import click

from kvfold.cli.options import Location
from kvfold.cli.output import say


@click.command("report")
@click.argument("runs", metavar="RUN...", type=Location(), nargs=-1, required=True)
@click.option("-o", "--out", type=Location(), default="report.html", show_default=True)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def command(runs: tuple[Path, ...], out: Path, force: bool) -> None:
    """Put everything measured about RUNs into one HTML file.

    A RUN is a folder that convert, heal or demo made, a file that bench --save wrote, or what
    eval --json printed. The report begins with its verdict on the last model: bytes, nats, speed.
    """
    from kvfold.report.html import write_report

    write_report(runs, out, force=force)
    say(str(out))
