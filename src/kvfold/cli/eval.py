"""``kvfold eval``"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfold import numbers
from kvfold.cli.options import Location, Number, Source
from kvfold.cli.output import emit
from kvfold.errors import InputError
from kvfold.numbers import Wholes, parts

if TYPE_CHECKING:
    from kvfold.quality.tasks import TaskScore


@click.command("eval")
@click.argument("source", metavar="SRC", type=Source())
@click.argument("outs", metavar="[OUT]...", type=Source(), nargs=-1)
@click.option("--text", "texts", type=Location(), multiple=True, help="UTF-8 file; repeatable.")
@click.option(
    "--needle", type=Number(Wholes(numbers.NEEDLE)), help="Ask for pass keys in texts of N tokens."
)
@click.option("--tasks", metavar="TASK,...", help="Tasks of lm-evaluation-harness.")
@click.option("--limit", type=Number(numbers.LIMIT), help="Examples of each task, to try it.")
@click.option("--context", type=Number(numbers.EVAL_WINDOW), default=512, show_default=True,
              help="Tokens per window.")  # fmt: skip
@click.option("--max-tokens", type=Number(numbers.TOKENS),
              help="At most so many of each text, spread over it.")  # fmt: skip
@click.option("--max-kl", type=Number(numbers.KL), help="Exit with 3 if a model's KL is above.")
@click.option("--max-ppl-ratio", type=Number(numbers.RATIO),
              help="Exit with 3 if a perplexity ratio is above.")  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
@click.option("--device", help="torch device.  [default: a GPU if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    source: str,
    outs: tuple[str, ...],
    texts: tuple[Path, ...],
    needle: tuple[int, ...] | None,
    tasks: str | None,
    limit: int | None,
    context: int,
    max_tokens: int | None,
    max_kl: float | None,
    max_ppl_ratio: float | None,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Compare OUT… with SRC on the same windows of text.

    Perplexity with its standard error; the perplexity ratio to SRC, paired window by window;
    KL(SRC || OUT) per token; how often both agree on the most likely token. Use text that was
    not used for calibration, and some of another kind. --needle asks for pass keys hidden at five
    depths of long texts; --tasks runs lm-evaluation-harness on every model.
    """
    from kvfold.cli.progress import progress_bar
    from kvfold.quality.device import pick_device
    from kvfold.quality.run import check_eval, check_thresholds, evaluate, find_needles
    from kvfold.quality.tasks import harness
    from kvfold.quality.text import read_texts

    if not texts and (max_kl is not None or max_ppl_ratio is not None):
        raise InputError("--max-kl and --max-ppl-ratio are measured on text", "name it with --text")
    if limit is not None and tasks is None:
        raise InputError("--limit is of --tasks", "leave it out, or name some tasks")
    sources = (source, *outs)
    lengths = needle or ()
    names = parts(tasks, "--tasks") if tasks is not None else ()
    if texts or not (lengths or names):
        check_eval(sources, texts, context, max_tokens)
    if names:
        harness()
        pick_device(device)
    for text in texts:
        read_texts([text], context)
    how: dict[str, Any] = {"dtype": dtype, "device": device}
    with progress_bar() as progress:
        results = (
            evaluate(
                sources, texts, context=context, max_tokens=max_tokens, progress=progress, **how
            )
            if texts
            else []
        )
        found = find_needles(sources, lengths, progress=progress, **how) if lengths else []
    scores = _run_tasks(sources, names, limit, how) if names else []

    def show() -> None:
        from kvfold.report.quality import print_needles, print_quality, print_tasks

        if results:
            print_quality(results)
        if found:
            print_needles(found)
        if scores:
            print_tasks(scores)

    # One document: a list of text scores, as ever, unless more was asked for.
    document: Any = [result.as_dict() for result in results]
    if lengths or names:
        document = {
            "texts": document,
            "needles": [each.as_dict() for each in found],
            "tasks": [score.as_dict() for score in scores],
        }
    emit(as_json, document, show)
    check_thresholds(results, max_kl, max_ppl_ratio)


def _run_tasks(
    sources: tuple[str, ...], names: tuple[str, ...], limit: int | None, how: dict[str, Any]
) -> "list[TaskScore]":
    from contextlib import ExitStack

    from kvfold.quality.run import local_folder
    from kvfold.quality.tasks import run_tasks

    with ExitStack() as stack:
        folders = [(source, local_folder(source, stack)) for source in sources]
        return run_tasks(folders, names, limit=limit, **how)
