"""Tables of attention and of decoding in transformers."""

from collections.abc import Iterator

from pages.rows import NOT_YET, Row, measured, results, table

NAMES = {"sdpa": "transformers `sdpa`, DynamicCache", "bf16": "kvfold bf16",
         "int8": "kvfold int8", "int4": "kvfold int4",
         "mistral.rs BF16": "mistral.rs, bfloat16"}  # fmt: skip

LONG = 16_384  # tokens of the longer of two steps over latents


def attention(file: str, by: str, columns: tuple[str, ...], **case: int) -> str:
    """Share of the floor, and speed over the fastest of PyTorch's ways."""
    fields = ("num_kv_heads", "head_dim", "context", "batch")
    rows = results(file, *(f"case.{name}" for name in fields), "implementation")
    rows = [r for r in rows if all(r["case"][k] == v for k, v in case.items())]
    found = {(r["case"]["num_kv_heads"], r["implementation"]): r for r in rows}
    heads = sorted({r["case"]["num_kv_heads"] for r in rows}, reverse=True)

    def cell(row: Row | None) -> str:
        if row is None or row["status"] != "ok":
            return "–"
        share, ratio = row["floor_fraction"]["median"], row["vs_best_peer"]["median"]
        return f"{share:.0%}, {ratio:.2f} ×"

    def own(count: int) -> str:
        ratios = [found[count, f"kvfold {name}"]["vs_own_bf16"] for name in ("int8", "int4")]
        return ", ".join(f"{ratio['median']:.2f}" for ratio in ratios)

    names = [f"kvfold {name}" for name in ("bf16", "int8", "int4")] + list(columns)
    body = ((str(n), *(cell(found.get((n, name))) for name in names), own(n)) for n in heads)
    return table((by, *names, "int8, int4 over own bf16"), body, 0) + measured(rows)


def decoding() -> str:
    """The short table of the README."""
    rows = results("attention", "case.num_kv_heads", "case.context", "implementation")
    found = {(r["case"]["num_kv_heads"], r["implementation"]): r
             for r in rows if r["case"]["context"] == 16384}  # fmt: skip
    heads = sorted({count for count, _ in found}, reverse=True)

    def cells(count: int) -> Iterator[str]:
        bf16, int8, int4 = (found[count, f"kvfold {name}"] for name in ("bf16", "int8", "int4"))
        seconds = [row["seconds"]["median"] for row in (found[count, "repeat"], bf16)]
        best = [f"{row['vs_best_peer']['median']:.1f}" for row in (bf16, int8, int4)]
        yield str(count)
        yield f"{bf16['floor_fraction']['median']:.0%}"
        yield best[0]
        yield f"{seconds[0] / seconds[1]:.0f}"
        yield from best[1:]

    columns = ("bf16: of floor", "× PyTorch's best", "× repeated K, V",
               "int8: × PyTorch's best", "int4: × PyTorch's best")  # fmt: skip
    return table(("KV heads", *columns), map(cells, heads), 0)


def sharing() -> str:
    """One model as MHA, as it is and folded: tokens a second, gigabytes and perplexity."""
    rows = results(
        "sharing", "case.model", "implementation", "case.context", "case.batch",
        only=lambda row: row["status"] == "ok",
    )  # fmt: skip
    if not rows:
        return NOT_YET
    cases = sorted({(r["case"]["batch"], r["case"]["context"]) for r in rows})
    found = {(r["case"]["model"], r["implementation"], r["case"]["batch"], r["case"]["context"]): r
             for r in rows}  # fmt: skip
    ways = list(dict.fromkeys((r["case"]["model"], r["implementation"]) for r in rows))

    def cells(way: tuple[str, str]) -> Iterator[str]:
        own = [row for row in rows if (row["case"]["model"], row["implementation"]) == way]
        yield f"{own[0]['case']['num_kv_heads']} ({own[0]['sharing']})"
        yield way[1]
        yield f"{own[0]['perplexity']:.2f}"
        for batch, context in cases:
            row = found.get((*way, batch, context))
            speed = "–" if row is None else f"{batch / row['seconds']['median']:.0f}"
            yield f"{speed}, {row['kv_bytes'] / 1e9:.2f}" if row is not None else speed

    heads = (f"{context:,} × {batch}: tokens/s, GB" for batch, context in cases)
    columns = ("KV heads", "attention, cache", "perplexity", *heads)
    return table(columns, map(cells, ways), 2) + measured(rows)


def prompts() -> str:
    rows = results("prefill", "kv_heads", "context")
    body = ((f"{r['context']:,}", str(r["kv_heads"]), *(f"{r['speed'][n]:.2f} ×"
             for n in ("kvfold", "repeat"))) for r in rows)  # fmt: skip
    return table(("tokens", "KV heads", "kvfold", "repeat K, V"), body, 0) + measured(rows)


def slope() -> str:
    rows = [r for r in results("decode_slope", "way", "weights")
            if r.get("weights", "bfloat16") == "bfloat16"]  # fmt: skip
    rows.sort(key=lambda r: list(NAMES).index(r["way"]))
    contexts = ("512", "2048", "4096", "7900")

    def cells(row: Row) -> Iterator[str]:
        yield NAMES[row["way"]]
        times = row["milliseconds"]
        yield " / ".join(f"{times[c]:.0f}" if c in times else "–" for c in contexts)
        yield f"{row['microseconds_per_token_of_context']:.2f}"

    (ours,) = (r for r in rows if r["way"] == "bf16")
    floor = (f"floor, bf16 KV ({ours['read_bandwidth'] / 1e9:.0f} GB/s)", "",
             f"{ours['bf16_floor']:.2f}")  # fmt: skip
    heads = ("attention, cache", "ms at 512 / 2,048 / 4,096 / 7,900", "µs per token of context")
    return table(heads, [*map(cells, rows), floor]) + measured(rows)


def profile() -> str:
    rows = [r for r in results("decode_profile", "way", "context", "weights")
            if r["context"] == 7900]  # fmt: skip
    parts = ("linear layers", "attention", "cache update", "rest")
    body = ((r["weights"], NAMES[r["way"]], *(f"{r['milliseconds'][p]:.1f}" for p in parts),
             f"{r['milliseconds']['step']:.0f}") for r in rows)  # fmt: skip
    return table(("weights", "attention, cache", *parts, "step"), body, 2) + measured(rows)


def whole_step() -> str:
    """Milliseconds of a step, by how it is computed."""
    rows = results("whole_step", "attention", "packed", "compiled", "variant", "threads", "weights")
    rows = [r for r in rows if r["weights"] == "bfloat16" and not r["variant"]]
    most = max((r["threads"] for r in rows), default=0)
    rows = [r for r in rows if r["threads"] == most]

    def cells(row: Row) -> Iterator[str]:
        yield "compiled" if row["compiled"] else "eager"
        yield "prepacked" if row["packed"] else "plain"
        yield "`sdpa`" if row["attention"] == "sdpa" else f"kvfold {row['attention']}"
        yield from (f"{row['milliseconds'][c]:.1f}" for c in ("512", "4096", "7900"))

    heads = ("step", "linear layers", "attention, cache", "ms at 512", "4,096", "7,900")
    return table(heads, map(cells, rows), 3) + measured(rows)


def latent_steps() -> str:
    """Shares of what products and reading alone would take, and speed over PyTorch's ways."""
    rows = [r for r in results("latents", "latent", "heads", "context", "way") if "seconds" in r]
    if not rows:
        return NOT_YET
    found = {(r["latent"], r["heads"], r["way"]): r for r in rows}
    formats = ("bf16", "int8", "fp8")

    def cells(latent: str, heads: int) -> Iterator[str]:
        own = [found[latent, heads, f"kvfold {name}"] for name in formats]
        ways = (found.get((latent, heads, f"matmul {name}")) for name in ("float32", "bfloat16"))
        best = min(r["seconds"] for r in ways if r)
        yield latent.replace("+", " + ")
        yield str(heads)
        for row in own:
            yield f"{row['of_products']:.0%}, {row['of_bytes']:.0%}"
        yield f"{_of_products_at(LONG, own[0]):.0%}"
        yield f"{own[0]['ns_per_token']:,.0f} ({own[0]['floor_ns_per_token']:,.0f})"
        yield f"{best / own[0]['seconds']:.1f} ×"
        ways = (found.get((latent, heads, f"vLLM {name}")) for name in ("float32", "bfloat16"))
        theirs = [r["seconds"] for r in ways if r]
        yield f"{min(theirs) / own[0]['seconds']:.1f} ×" if theirs else "–"

    heads = ("latent", "query heads", *(f"{name}: of products, of bytes" for name in formats),
             f"bf16 at {LONG:,}: of products", "bf16: ns per token (floor)",
             "× PyTorch's best", "× vLLM's")  # fmt: skip
    cases = dict.fromkeys((latent, heads) for latent, heads, _ in found)
    return table(heads, (cells(*case) for case in cases), 0) + measured(rows)


def _of_products_at(context: int, row: Row) -> float:
    """The share of a step over more tokens, by what each of them adds."""
    seconds = row["seconds"] + row["ns_per_token"] * 1e-9 * (context - row["context"])
    return float(row["of_products"] * row["seconds"] / row["context"] * context / seconds)


def whole_latent_step() -> str:
    """Steps with latent attention, and how often transformers' fits into ours."""
    rows = results("latent_step", "way", "weights", "threads", "layers")
    contexts = ("512", "4096", "16384")
    theirs = {r["weights"]: r["milliseconds"] for r in rows if r["way"] == "sdpa"}

    def cells(row: Row) -> Iterator[str]:
        yield row["weights"]
        yield NAMES[row["way"]]
        times = row["milliseconds"]
        yield " / ".join(f"{times[c]:,.0f}" if c in times else "–" for c in contexts)
        ratios = {c: theirs[row["weights"]][c] / times[c] for c in contexts if c in times}
        yield " / ".join(f"{ratios[c]:.1f}" if c in ratios else "–" for c in contexts)
        yield f"{row['microseconds_per_token_and_layer']:.2f}"

    heads = ("weights", "attention, cache", "ms at 512 / 4,096 / 16,384", "× `sdpa`'s speed",
             "µs per token and layer")  # fmt: skip
    floors = {(f"{r['read_bandwidth'] / 1e9:.0f}", f"{r['bf16_floor']:.3f}") for r in rows
              if r["way"] == "bf16"}  # fmt: skip
    last = [("", f"floor, bf16 latents ({speed} GB/s)", "", "", f) for speed, f in sorted(floors)]
    return table(heads, [*map(cells, rows), *last], 2) + measured(rows)
