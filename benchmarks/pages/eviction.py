"""Tables of caches that keep a part of their tokens."""

from collections.abc import Iterator

from pages.rows import NOT_YET, Row, measured, results, table
from pages.selection import steps

_WAYS = ("attention", "recent", "oracle", "select", "snapkv", "knorm")
_SAID = {
    "select": "`select`, all kept",
    "snapkv": "kvpress SnapKV",
    "knorm": "kvpress Knorm",
}


def _said(by: str) -> str:
    return _SAID.get(by, f"`{by}`")


def eviction_steps() -> str:
    """A step of one layer, over what was kept."""
    return steps("kept")


def eviction_quality() -> str:
    """Perplexity ratio and divergence at each budget, on two texts."""
    return _quality("smollm2")


def eviction_gemma() -> str:
    """The same of a model with sliding windows, whose layers of full attention forget."""
    return _quality("gemma")


def _quality(model: str) -> str:
    case = ("model", "text", "dtype", "by", "budget")
    rows = results(
        "evict_quality", *case, only=lambda row: "text" in row and row.get("model") == model
    )
    if not rows:
        return NOT_YET
    found = {(r["text"], r["by"], r["budget"]): r for r in rows}
    texts = ("handbook", "code")

    def cells(budget: float, by: str) -> Iterator[str]:
        yield f"{budget:.1%}"
        yield _said(by)
        for text in texts:
            row = found[text, by, budget]
            yield f"{row['ratio']:.3f}, {row['kl']:.4f}"
        yield f"{found[texts[0], by, budget]['bytes']:.1%}"

    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    body = (cells(budget, by) for budget in budgets for by in _WAYS)
    heads = ("budget", "kept by", *(f"{text}: ratio, KL" for text in texts), "bytes")
    return table(heads, body, 2) + measured(rows)


def eviction_needles() -> str:
    """Pass keys found, of as many as were asked for."""
    case = ("needle", "known", "by", "budget")
    rows = results("evict_quality", *case, only=lambda r: "needle" in r)
    if not rows:
        return NOT_YET
    found = {tuple(row[name] for name in case): row for row in rows}
    columns = list(dict.fromkeys((r["known"], r["needle"]) for r in rows))
    columns.sort(key=lambda column: (not column[0], column[1]))

    def cell(row: Row | None) -> str:
        return f"{row['found']} of {row['asked']}" if row else "–"

    def cells(budget: float, by: str) -> Iterator[str]:
        yield f"{budget:.1%}"
        yield _said(by)
        for known, length in columns:
            yield cell(found.get((length, known, by, budget)))

    budgets = sorted({row["budget"] for row in rows if row["budget"] < 1}, reverse=True)
    known_ways = {row["by"] for row in rows}
    by_budget = ((budget, by) for budget in budgets for by in _WAYS if by in known_ways)
    ways = [(1.0, "dense"), *by_budget]
    heads = (f"{'known' if known else 'asked later'}, {n:,} tokens" for known, n in columns)
    return table(("budget", "kept by", *heads), (cells(*way) for way in ways), 2) + measured(rows)


def combined() -> str:
    """What folding, INT8, selecting and evicting cost and save together."""
    rows = results("combined", "text", "way")
    if not rows:
        return NOT_YET
    found = {(row["text"], row["way"]): row for row in rows}
    ways, texts = (list(dict.fromkeys(row[name] for row in rows)) for name in ("way", "text"))
    first = {text: found[text, ways[0]] for text in texts}

    def cells(way: str) -> Iterator[str]:
        row = found[texts[0], way]
        yield way
        for side in ("kept_bytes", "read_bytes"):
            yield f"{row[side] / 2**20:.1f}"
        for text in texts:
            yield (
                f"{found[text, way]['nats'] - first[text]['nats']:+.3f}" if way != ways[0] else "0"
            )
        shares = (found[text, way]["seconds"] / first[text]["seconds"] for text in texts)
        yield " / ".join(f"{share:.0%}" for share in shares)

    heads = ("cache", "MiB kept", "MiB read a step", *(f"{text}: nats" for text in texts), "time")
    return table(heads, map(cells, ways)) + measured(rows)


def recall() -> str:
    """Values found of names in long noise."""
    rows = results("recall", "way", "budget")
    if not rows:
        return NOT_YET
    found = {(row["way"], row["budget"]): row for row in rows}
    budgets = sorted({row["budget"] for row in rows if row["budget"] < 1}, reverse=True)
    ways = sorted(dict.fromkeys(row["way"] for row in rows))

    def cells(way: str) -> Iterator[str]:
        yield f"`{way}`"
        for budget in budgets:
            row = found.get((way, budget)) or found[way, 1.0]
            yield f"{row['found']} of {row['asked']}"

    return table(("cache", *(f"{b:.1%}" for b in budgets)), map(cells, ways)) + measured(rows)
