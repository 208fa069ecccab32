"""Tables of serving through vLLM."""

from collections.abc import Iterator

from pages.rows import NOT_YET, Row, measured, results, table

CASE = ("case.model", "case.context", "case.batch", "case.memory", "implementation")


def served() -> list[Row]:
    """What was measured of engines that take turns, by model and attention, source first."""
    return results("serving", *CASE, only=lambda row: not row.get("starts"))


def short_of_memory(rows: list[Row]) -> list[Row]:
    """The rows of runs in which a model had too little memory for all requests."""
    short = {_run(row) for row in rows if row["running"] < row["case"]["batch"]}
    return [row for row in rows if _run(row) in short]


def _run(row: Row) -> tuple[int, int]:
    return row["case"]["memory"], row["case"]["batch"]


def serving(model: str) -> str:
    """Decoding through vLLM, memory enough for all requests."""
    found: dict[tuple[str, str, int], dict[int, Row]] = {}
    rows = served()
    short = short_of_memory(rows)
    for row in rows:
        case = row["case"]
        if case["model"].startswith(model) and row not in short:
            key = case["model"], row["implementation"], case["batch"]
            found.setdefault(key, {})[case["context"]] = row
    contexts = sorted({context for rows in found.values() for context in rows})

    def cells(key: tuple[str, str, int]) -> Iterator[str]:
        of = found[key]
        (one, *_), (name, attention, batch) = of.values(), key
        yield f"{name}, {one['case']['num_heads']}:{one['case']['num_kv_heads']}"
        yield attention
        yield str(batch)
        for field, scale, form in (("first_token", 1e3, ".0f"), ("prefill_vs_peer", 1, ".2f"),
                                   ("seconds", 1e3, ".1f"),
                                   ("vs_best_peer", 1, ".2f"), ("vs_first", 1, ".2f")):  # fmt: skip
            yield " / ".join(
                f"{of[context][field]['median'] * scale:{form}}" if context in of else "–"
                for context in contexts
            )
        yield f"{1e6 * one['slope']['median']:.2f}" if one["slope"] else "–"

    told = " / ".join(f"{context:,}" for context in contexts)
    heads = ("model, heads", "attention, cache", "at once", f"first token alone, ms at {told}",
             "its speed, × vLLM's own", "ms per token", "× vLLM's own", "× source",
             "µs per token of context")  # fmt: skip
    return table(heads, map(cells, found), 2) + measured(rows) if found else NOT_YET


def serving_in_short() -> str:
    """Decoding through vLLM as a multiple of its own attention's speed: a source model."""
    cases = ((1, 512), (1, 4096), (1, 7900), (8, 4096), (16, 4096))
    rows = served()
    rows = [row for row in rows if row["case"]["model"] == "SmolLM2-135M"]
    short, found = short_of_memory(rows), dict[str, dict[tuple[int, int], Row]]()
    for row in rows:
        if row not in short:
            case = row["case"]["batch"], row["case"]["context"]
            found.setdefault(row["implementation"], {})[case] = row

    def cells(attention: str) -> Iterator[str]:
        yield attention
        for case in cases:
            row = found[attention].get(case)
            yield f"{row['vs_best_peer']['median']:.2f}" if row else "–"
        slope = found[attention][1, 512]["slope"]
        yield f"{1e6 * slope['median']:.2f}" if slope else "–"

    heads = ("attention, cache", *(f"{n} × {context:,}" for n, context in cases),
             "µs per token of context")  # fmt: skip
    return table(heads, map(cells, found), 1) + measured(rows) if found else NOT_YET


def serving_memory() -> str:
    """Output of models with the same memory, which does not hold all requests of the source."""
    rows = short_of_memory(served())

    def cells(row: Row) -> Iterator[str]:
        case = row["case"]
        yield f"{case['model']}, {case['num_heads']}:{case['num_kv_heads']}"
        yield row["implementation"]
        yield f"{case['memory'] / 2**20:.0f}"
        yield f"{row['cache_tokens']:,}"
        yield str(row["running"])
        yield f"{row['tokens_per_second']['median']:.0f}"
        yield from (f"{row[name]['median']:.2f} ×" for name in ("vs_best_peer", "vs_first"))

    heads = ("model, heads", "attention, cache", "memory, MiB", "tokens it holds", "at once",
             "tokens/s", "× vLLM's own", "× source")  # fmt: skip
    return table(heads, map(cells, rows), 2) + measured(rows) if rows else NOT_YET


def serving_starts() -> str:
    """Engines that were started again and again, alone: the spread is that of starts."""
    rows = results("serving", *CASE, only=lambda row: bool(row.get("starts")))

    def cells(row: Row) -> Iterator[str]:
        case, seconds = row["case"], row["seconds"]
        yield f"{case['model']}, {case['num_heads']}:{case['num_kv_heads']}"
        yield row["implementation"]
        yield f"{case['batch']} × {case['context']:,}"
        yield str(row["starts"])
        yield f"{1e3 * seconds['median']:.2f}"
        yield " ".join(f"{1e3 * each:.1f}" for each in sorted(seconds["samples"]))

    heads = ("model, heads", "attention, cache", "at once × context", "starts",
             "ms per token, median", "every start")  # fmt: skip
    return table(heads, map(cells, rows), 3) + measured(rows) if rows else NOT_YET
