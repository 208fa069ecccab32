"""The table of an evaluation."""

from collections.abc import Sequence

from kvfold.quality.scores import Quality
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
