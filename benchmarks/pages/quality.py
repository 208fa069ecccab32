"""Tables of what folding, healing and cache formats keep, and the memory that folding takes."""

import math
from collections.abc import Iterable, Iterator

from pages.rows import NOT_YET, Row, measured, results, table


def caches() -> str:
    rows = results("cache_quality", "text", "cache")
    found = {(r["text"], r["cache"]): r for r in rows}
    names = dict.fromkeys(r["cache"] for r in rows)

    def cells(name: str) -> Iterator[str]:
        yield name
        for text in ("handbook", "documentation"):
            row = found[text, name]
            yield f"{row['kl']:.1e}"
            yield f"{row['perplexity_ratio']:.4f}"
            yield f"{row['top1']:.1%}"
        size = found["handbook", name]["bytes_per_token"]
        yield "–" if math.isnan(size) else f"{size / 1024:.1f}"

    scores = ("perplexity ratio", "same top-1")
    heads = ("cache", "handbook: KL", *scores, "documentation: KL", *scores,
             "KiB per token, allocated")  # fmt: skip
    return table(heads, map(cells, names)) + measured(rows)


def _folded() -> list[Row]:
    """The latest row of each method and fit, from the worst to the best."""
    found = {f"{r['method']}-{r['fit']}": r for r in results("fold_quality", "method", "fit")}
    return [found[name] for name in LABELS]


def folding() -> str:
    rows = _folded()

    def cells(row: Row) -> Iterator[str]:
        yield row["method"]
        yield row["fit"]
        yield from (f"{s['nats_lost']:.2f} ± {s['nats_lost_error']:.2f}" for s in row["scores"])
        yield " / ".join(f"{s['kl']:.2f}" for s in row["scores"])
        yield " / ".join(f"{s['top1']:.0%}" for s in row["scores"])
        yield f"{row['run']['seconds']:.0f}"

    heads = ("method", "fit", "handbook", "documentation", "KL", "top-1", "seconds")
    handbook, documentation = rows[-1]["source_perplexity"]
    source = f"The source's perplexity: {handbook:.2f} on the handbook, {documentation:.2f} on the "
    return f"{table(heads, map(cells, rows), 2)}\n\n{source}documentation." + measured(rows)


LABELS = {
    "random-none": "`random` (arXiv 2305.13245)",
    "first-none": "`first` (arXiv 2305.13245)",
    "mean-none": "`mean` (arXiv 2305.13245)",
    "aligned-none": "`aligned`",
    "pca-none": "`pca`, closed form",
    "pca-refit": "`pca` + refit",
    "auto-local": "**`auto`** (default: `pca` + fit + refit)",
}


_SHORT = ("handbook.txt", "documentation.txt")
MADE = {
    "converted": "**`auto`**, four kinds of text",
    "finished": "the same, **then healed** with 60,000 tokens of these",
    "healed": "**healed** with 700,000 tokens of five kinds instead",
}


def kept() -> str:
    """The short table of the README, healing included."""

    def took(seconds: float) -> str:
        return "seconds" if seconds < 60 else f"{seconds / 60:.0f} min"

    def cells(what: str, scores: Iterable[Row], time: str) -> tuple[str, ...]:
        lost = (f"{s['nats_lost']:.2f} ± {s['nats_lost_error']:.2f}" for s in scores)
        return what, *lost, time

    body = [cells(LABELS[f"{r['method']}-{r['fit']}"], r["scores"], took(r["run"]["seconds"]))
            for r in _folded()]  # fmt: skip
    rows = [row for row in results("healing", "name", "text") if row["text"] in _SHORT]
    made = {name: [row for row in rows if row["name"] == name] for name in MADE}
    for name in MADE:
        time = ("" if name == "converted" else "+ ") + took(made[name][0]["seconds"])
        body.append(cells(MADE[name], made[name], time))
    return table(("", "handbook", "documentation", "time"), body)


def latents() -> str:
    rows = results("latent_quality", "numbers", "method", "fit", "latent", "healed")
    if not rows:
        return NOT_YET
    rows.sort(key=lambda row: (-row["numbers"], row["fit"] != "none"))

    def cells(row: Row) -> Iterator[str]:
        yield str(row["numbers"])
        yield f"`{row['latent']}`" if row["latent"] else "one KV head"
        yield row["method"]
        healed = row["healed"]
        yield f"{row['fit']}, healed with {healed:,} tokens" if healed else row["fit"]
        for context in ("512", "4096"):
            yield " / ".join(f"{s['nats_lost']:.2f}" for s in row["scores"][context])

    heads = ("cached numbers", "what", "method", "fit", "lost at 512", "lost at 4,096")
    return table(heads, map(cells, rows), 4) + measured(rows)


def energies() -> str:
    rows = [row for row in _folded() if row["fit"] == "none"]
    layers = enumerate(zip(*(row["captured"] for row in rows), strict=True))
    body = ((str(n), *(f"{v:.2f}, {k:.2f}" for v, k in pairs)) for n, pairs in layers)
    return table(("layer", *(f"{row['method']} V, K" for row in rows)), body) + measured(rows)


def healing() -> str:
    rows = results("healing", "name", "text", only=lambda row: row["name"] in MADE)
    found = {(r["name"], r["text"].removesuffix(".txt")): r for r in rows}
    texts = ("handbook", "documentation", "jargon")

    def cells(name: str) -> Iterator[str]:
        yield MADE[name].replace("*", "")
        for row in (found[name, text] for text in texts):
            yield f"{row['nats_lost']:.3f} ± {row['nats_lost_error']:.3f}"

    less = (1 - found["healed", t]["nats_lost"] / found["converted", t]["nats_lost"] for t in texts)
    body = [*map(cells, MADE), ("won back of the first row", *(f"{part:.0%}" for part in less))]
    return table(("", *texts), body) + measured(rows)


def healing_small() -> str:
    rows = [r for r in results("healing_small", "method", "kv_heads", "share")
            if r["kv_heads"] == 1]  # fmt: skip
    found = {(r["method"], r["share"]): r for r in rows}
    shares = sorted({r["share"] for r in rows})

    def cells(name: str) -> Iterator[str]:
        yield f"`{name}`"
        for row in (found[name, share] for share in shares):
            yield f"{row['ratio']:.2f} ± {row['ratio_error']:.2f}"

    heads = ["8 → 1", *(f"{share:.1%}".replace(".0%", "%") for share in shares)]
    heads[1] = "no healing"
    return table(heads, map(cells, dict.fromkeys(r["method"] for r in rows))) + measured(rows)


def qk_norm() -> str:
    rows = results("qk_norm", "model", "num_kv_heads", "fit")
    if not rows:
        return NOT_YET
    found = {(row["model"], row["fit"], row["num_kv_heads"]): row for row in rows}
    counts = sorted({row["num_kv_heads"] for row in rows}, reverse=True)

    def cells(case: tuple[str, str]) -> Iterator[str]:
        yield "QK-norm" if case[0] == "qk-norm" else "without"
        yield case[1]
        for row in (found[*case, count] for count in counts):
            yield f"{row['nats_lost']:.3f} ± {row['nats_lost_error']:.3f}"

    cases = dict.fromkeys((row["model"], row["fit"]) for row in rows)
    return table(("", "fit", *(f"8 → {n}" for n in counts)), map(cells, cases), 2) + measured(rows)


def own_text() -> str:
    """What one KV head loses on three kinds of text, by the text that it was calibrated on."""
    rows = results("own_text", "text", only=lambda row: row["scores"][0]["tokens"] > 10_000)
    if not rows:
        return NOT_YET

    def cells(row: Row) -> Iterator[str]:
        yield f"`{row['text']}`" if row["text"] == "self" else row["text"]
        yield f"{row['calibration_tokens']:,}"
        for score in row["scores"]:
            yield f"{score['nats_lost']:.2f} ± {score['nats_lost_error']:.2f}"

    kinds = [score["text"].removesuffix(".txt") for score in rows[0]["scores"]]
    return table(("calibrated on", "tokens", *kinds), map(cells, rows)) + measured(rows)


def local_tasks() -> str:
    """Accuracy of each model in percent, ± one standard error; pass keys found at all depths."""
    rows = results("local_tasks", "what", "name", only=lambda row: row["limit"] is None)
    if not rows:
        return NOT_YET
    cells = {(row["what"], row["name"]): row for row in rows}
    names, tasks = (list(dict.fromkeys(row[each] for row in rows)) for each in ("name", "what"))

    def line(what: str) -> Iterator[str]:
        yield what
        for name in names:
            row = cells[what, name]
            error = row["error"]
            yield f"{row['value']:.1%}" + ("" if error is None else f" ± {error:.1%}")

    return table(("", *names), map(line, tasks)) + measured(rows)


def memory() -> str:
    rows = results("streaming_memory", "case")

    def cells(row: Row) -> Iterator[str]:
        yield row["case"]
        yield f"{row['run']['peak_memory_bytes'] / 1e9:.2f} GB"
        yield "–" if "calibrated" in row["case"] else f"{row['limit_bytes'] / 1e9:.2f} GB"
        yield f"{row['run']['seconds']:.0f}"

    return table(("case", "peak", "limit", "seconds"), map(cells, rows)) + measured(rows)
