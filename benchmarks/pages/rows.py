"""Results as the benchmarks wrote them, and tables in Markdown."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1]
NOT_YET = "*Not measured yet.*"

Row = dict[str, Any]


def results(name: str, *case: str, only: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """The rows of a file of results, the last of each case; ``a.b`` is a field of a field."""
    rows: dict[tuple[Any, ...], Row] = {}
    file = FOLDER / f"{name}.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        if not only(row):
            continue
        key = tuple(_field(row, field) for field in case)
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def _field(row: Row, name: str) -> Any:
    for part in name.split("."):
        row = row.get(part, {})
    return str(row)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are words and the others numbers."""
    heads = list(headings)
    rule = ["---" if at < left else "---:" for at in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def measured(rows: list[Row]) -> str:
    """When and where: the line below a table."""
    seen = set()
    for row in rows:
        if isinstance(row["machine"], dict):
            row = row["machine"] | {"machine": row["machine"]["cpu"], "cpu": row["machine"]["isa"]}
            row["machine"] += f", {row['threads']} threads"
        seen.add(f"{row['date'][:10]}: {row['machine']}, {row['cpu']}, torch {row['torch']}")
    return f"\n\n*{'; '.join(sorted(seen))}.*"
