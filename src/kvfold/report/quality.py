"""The table of an evaluation."""

from collections.abc import Sequence

from kvfold.quality.needle import Retrieval
from kvfold.quality.scores import Quality
from kvfold.quality.tasks import TaskScore
from kvfold.report.scored import by_depth
from kvfold.report.tables import print_table, size


def print_quality(results: Sequence[Quality]) -> None:
    """One table per text, the reference first."""
    for text in dict.fromkeys(result.text for result in results):
        rows = [result for result in results if result.text == text]
        print_table(
            f"{text}: {rows[0].tokens:,} tokens predicted",
            ["model", "KV/token", "perplexity", "ratio", "nats lost", "KL", "p99", "top-1"],
            [_row(result, index == 0) for index, result in enumerate(rows)],
            caption="± one standard error; ratio, KL and top-1 agreement against the first model",
        )


def _row(result: Quality, reference: bool) -> list[str]:
    perplexity = f"{result.perplexity:.2f} ± {result.perplexity_error:.2f}"
    cells = [result.name, size(result.kv_bytes_per_token), perplexity]
    if reference:
        return cells + ["1"] + [""] * 4
    return [
        *cells,
        f"{result.ratio:.3f} ± {result.ratio_error:.3f}",
        f"{result.nats_lost:.3f}",
        f"{result.kl:.3f}",
        f"{result.kl_p99:.2f}",
        f"{result.top1:.1%}",
    ]


def print_needles(results: Sequence[Retrieval]) -> None:
    """Keys found, and nats of the right answer, by depth; a table for each length."""
    for tokens, columns, body in by_depth([result.as_dict() for result in results]):
        title = f"Pass keys in {tokens:,} tokens: found, nats per token of the key"
        print_table(title, ["model", *columns], body)


def print_tasks(scores: Sequence[TaskScore]) -> None:
    """One row per task and metric, a column per model."""
    names = list(dict.fromkeys(score.name for score in scores))
    found = {(s.task, s.metric, s.name): s for s in scores}
    rows = []
    for task, metric in dict.fromkeys((s.task, s.metric) for s in scores):
        row = [task, metric]
        for name in names:
            score = found.get((task, metric, name))
            error = "" if score is None or score.error is None else f" ± {score.error:.3f}"
            row.append("" if score is None else f"{score.value:.3f}{error}")
        rows.append(row)
    print_table("Tasks (lm-evaluation-harness)", ["task", "metric", *names], rows)
