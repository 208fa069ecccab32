"""``kvfold eval``"""

from typing import TYPE_CHECKING, Any

import click

from kvfold.cli.output import emit
from kvfold.cli.parse import asks
from kvfold.quality.request import EvalRequest

if TYPE_CHECKING:
    from kvfold.quality.needle import Way


@click.command("eval")
@asks(EvalRequest)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(request: EvalRequest, as_json: bool) -> None:
    """Compare OUT… with SRC on the same windows of text.

    Perplexity with its standard error; the perplexity ratio to SRC, paired window by window;
    KL(SRC || OUT) per token; how often both agree on the most likely token. Use text that was
    not used for calibration, and some of another kind. --needle asks for pass keys hidden at five
    depths of long texts, with --select also by caches that read part of themselves (texts of 2,048
    tokens and more), with --evict by caches that keep part of them: once with the question in the
    prompt, once asked after it; --tasks runs lm-evaluation-harness on every model.
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
        caches = _caches(request)
        found = score_needles(request, progress, caches) if request.lengths else []
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


def _caches(request: EvalRequest) -> "dict[str, Way]":
    """What answers besides the model: caches that read, or keep, such shares."""
    if not (request.selects or request.evicts):
        return {}
    import kvfold.transformers as drop_in
    from kvfold.ops.evict import Evict
    from kvfold.ops.select import Select
    from kvfold.quality.needle import Way

    def of(known: bool = False, **options: Any) -> "Way":
        def make(model: Any) -> Any:
            model.set_attn_implementation("kvfold")
            return drop_in.KVCache(model.config, **options)

        return Way(make, known)

    found = {f"{n:.4g} read": of(select=Select(budget=n)) for n in request.selects}
    for n in request.evicts:
        found[f"{n:.4g} kept"] = of(known=True, evict=Evict(budget=n))
        found[f"{n:.4g} kept, then asked"] = of(evict=Evict(budget=n))
    return found
