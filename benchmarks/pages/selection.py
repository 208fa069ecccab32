"""Tables of caches that are read in part."""

from collections.abc import Iterator

from pages.rows import NOT_YET, Row, measured, results, table


def selection_steps() -> str:
    """A step of one layer, whole and in part."""
    return steps("read")


def steps(part: str) -> str:
    """Bytes and time of steps over caches of which a share was ``read`` or ``kept``."""
    rows = results("select", "implementation")
    if not rows:
        return NOT_YET
    found = {row["implementation"].removeprefix("kvfold "): row for row in rows}
    dtypes = [name for name in found if "," not in name]
    parts = [name.split(", ")[1] for name in found if name.endswith(part)]
    shares = sorted({float(words.split()[0]) for words in parts}, reverse=True)

    def cells(dtype: str) -> Iterator[str]:
        whole = found[dtype]
        yield dtype
        for share in shares:
            some = found[f"{dtype}, {share:.4g} {part}"]
            read = some["kv_bytes"] / whole["kv_bytes"]
            time = some["seconds"]["median"] / whole["seconds"]["median"]
            yield f"{read:.1%}, {time:.0%}"

    heads = ("cache", *(f"budget {share:.1%}: bytes, time" for share in shares))
    return table(heads, map(cells, dtypes)) + measured(rows)


def selection_quality() -> str:
    """Perplexity ratio and divergence at each budget, on two texts."""
    case = ("text", "page_size", "by", "budget")
    rows = results("select_quality", *case, only=lambda r: "text" in r)
    if not rows:
        return NOT_YET
    found = {tuple(row[name] for name in case): row for row in rows}
    texts = ("handbook", "code")
    pages = sorted({row["page_size"] for row in rows}, reverse=True)
    ways = sorted({(r["budget"], r["by"]) for r in rows if r["by"] != "dense"}, key=_order)

    def cells(way: tuple[float, str]) -> Iterator[str]:
        budget, by = way
        yield f"{budget:.1%}"
        yield f"`{by}`" if by != "window" else "first 64 and last tokens only"
        for text in texts:
            for page in pages:
                row = found.get((text, page, by, budget))
                yield f"{row['ratio']:.3f}, {row['kl']:.4f}" if row else "–"
        row = found.get((texts[0], pages[-1], by, budget))
        yield f"{row['bytes']:.1%}" if row else "–"

    heads = (f"{text}, pages of {page}: ratio, KL" for text in texts for page in pages)
    return table(("budget", "by", *heads, "bytes read"), map(cells, ways), 2) + measured(rows)


def _order(way: tuple[float, str]) -> tuple[float, int]:
    return -way[0], ("spread", "box", "exact", "window").index(way[1])


def selection_needles() -> str:
    """Pass keys found, of as many as were asked for."""
    rows = results("select_quality", "needle", "by", "budget", only=lambda r: "needle" in r)
    if not rows:
        return NOT_YET
    found = {(r["needle"], r["by"], r["budget"]): r for r in rows}
    lengths = list(dict.fromkeys(row["needle"] for row in rows))

    def cell(row: Row | None) -> str:
        return f"{row['found']} of {row['asked']}" if row else "–"

    ways = sorted({(r["budget"], r["by"]) for r in rows if r["by"] != "dense"}, key=_order)
    ways = [(1.0, "dense"), *ways]
    body = (
        (f"{budget:.1%}", f"`{by}`", *(cell(found.get((n, by, budget))) for n in lengths))
        for budget, by in ways
    )
    return table(("budget", "by", *(f"{n:,} tokens" for n in lengths)), body, 2) + measured(rows)
