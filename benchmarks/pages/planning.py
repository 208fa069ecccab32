"""Tables of what ``kvfold plan`` says beside what was measured."""

from collections.abc import Iterator
from statistics import median

from pages.rows import Row, measured, results, table


def planning_cases() -> str:
    rows = results("plan_decode", "model", "context", "batch", "cache")

    def cells(row: Row) -> Iterator[str]:
        batch = f" × {row['batch']}" if row["batch"] > 1 else ""
        yield row["model"]
        yield f"{row['context']:,}{batch}"
        yield row["cache"]
        yield from (f"{row[f'{what}_ms']:.3g}" for what in ("bound", "expected", "measured"))
        yield f"{row['expected_over_measured']:.2f}"

    heads = ("model", "context × batch", "cache", "bound, ms", "expected, ms", "measured, ms",
             "expected / measured")  # fmt: skip
    return table(heads, map(cells, rows), 3) + measured(rows)


def planning() -> str:
    rows = results("plan_decode", "model", "context", "batch", "cache")
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["model"], []).append(row["expected_over_measured"])
    body = ((model, str(len(found)), *(f"{x:.2f}" for x in (min(found), median(found), max(found))))
            for model, found in ratios.items())  # fmt: skip
    heads = ("model", "cases", "least expected / measured", "median", "most")
    return table(heads, body) + measured(rows)
