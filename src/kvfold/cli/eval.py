"""``kvfold eval``"""

from typing import Any

import click

from kvfold.cli.output import emit
from kvfold.cli.parse import asks
from kvfold.quality.request import EvalRequest


@click.command("eval")
@asks(EvalRequest)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(request: EvalRequest, as_json: bool) -> None:
    """Compare OUT… with SRC on the same windows of text.

    Perplexity with its standard error; the perplexity ratio to SRC, paired window by window;
    KL(SRC || OUT) per token; how often both agree on the most likely token. Use text that was
    not used for calibration, and some of another kind. --needle asks for pass keys hidden at five
    depths of long texts; --tasks runs lm-evaluation-harness on every model.
    """
    from kvfold.cli.progress import progress_bar
    from kvfold.quality.run import (
        check_eval,
        check_thresholds,
        score_needles,
        score_tasks,
        score_texts,
    )

    check_eval(request)
    with progress_bar() as progress:
        results = score_texts(request, progress) if request.texts else []
        found = score_needles(request, progress) if request.lengths else []
    scores = score_tasks(request) if request.tasks else []

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
    if request.lengths or request.tasks:
        document = {
            "texts": document,
            "needles": [each.as_dict() for each in found],
            "tasks": [score.as_dict() for score in scores],
        }
    emit(as_json, document, show)
    check_thresholds(results, request.max_kl, request.max_ppl_ratio)
