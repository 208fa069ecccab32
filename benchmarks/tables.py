"""The tables of the benchmarks' pages, from what the benchmarks wrote.

    python benchmarks/tables.py            # after a benchmark: puts its numbers into the pages
    python benchmarks/tables.py --check    # exits with 1 where a page has others

Of results with the same case the last counts. A table stands in a page between ``<!-- table NAME
-->`` and ``<!-- end -->``; its last line says when and where it was measured.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from kvfold.files import write_text

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PAGES = (
    FOLDER / "README.md", FOLDER / "LOG.md", ROOT / "README.md", ROOT / "docs" / "serving.md",
)  # fmt: skip
PLACE = re.compile(r"(<!-- table ([\w-]+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
NAMES = {"sdpa": "transformers `sdpa`, DynamicCache", "bf16": "kvfold bf16",
         "int8": "kvfold int8", "int4": "kvfold int4",
         "mistral.rs BF16": "mistral.rs, bfloat16"}  # fmt: skip


def results(name: str, *case: str) -> list[Row]:
    """The rows of a file of results, the last of each case; ``a.b`` is a field of a field."""
    rows: dict[tuple[Any, ...], Row] = {}
    file = FOLDER / f"{name}.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
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


def folding() -> str:
    rows = results("fold_quality", "method", "fit")

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


def kept() -> str:
    """The short table of the README, healing included."""

    def took(seconds: float) -> str:
        return "seconds" if seconds < 60 else f"{seconds / 60:.0f} min"

    def cells(what: str, scores: Iterable[Row], time: str) -> tuple[str, ...]:
        lost = (f"{s['nats_lost']:.2f} ± {s['nats_lost_error']:.2f}" for s in scores)
        return what, *lost, time

    folded = results("fold_quality", "method", "fit")
    body = [cells(LABELS[f"{r['method']}-{r['fit']}"], r["scores"], took(r["run"]["seconds"]))
            for r in folded]  # fmt: skip
    healed = [row for row in results("healing", "name", "text") if row["name"] == "healed"]
    what = "**`auto`, then healed** with 200,000 tokens"
    body.append(cells(what, healed, f"+ {took(healed[0]['seconds'])}"))
    return table(("", "handbook", "documentation", "time"), body)


def energies() -> str:
    rows = [row for row in results("fold_quality", "method", "fit") if row["fit"] == "none"]
    layers = enumerate(zip(*(row["captured"] for row in rows), strict=True))
    body = ((str(n), *(f"{v:.2f}, {k:.2f}" for v, k in pairs)) for n, pairs in layers)
    return table(("layer", *(f"{row['method']} V, K" for row in rows)), body) + measured(rows)


def healing() -> str:
    rows = results("healing", "name", "text")
    found = {(r["name"], r["text"].removesuffix(".txt")): r for r in rows}
    texts = ("handbook", "documentation")

    def cells(name: str) -> Iterator[str]:
        yield name
        for row in (found[name, text] for text in texts):
            yield f"{row['nats_lost']:.3f} ± {row['nats_lost_error']:.3f}"

    less = (1 - found["healed", t]["nats_lost"] / found["folded", t]["nats_lost"] for t in texts)
    body = [*map(cells, ("folded", "healed")), ("less by", *(f"{part:.0%}" for part in less))]
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


def memory() -> str:
    rows = results("streaming_memory", "case")

    def cells(row: Row) -> Iterator[str]:
        yield row["case"]
        yield f"{row['run']['peak_memory_bytes'] / 1e9:.2f} GB"
        yield "–" if "calibrated" in row["case"] else f"{row['limit_bytes'] / 1e9:.2f} GB"
        yield f"{row['run']['seconds']:.0f}"

    return table(("case", "peak", "limit", "seconds"), map(cells, rows)) + measured(rows)


def served() -> list[Row]:
    """What was measured of serving, by model and attention, source first."""
    case = ("model", "context", "batch", "memory")
    return results("serving", *(f"case.{name}" for name in case), "implementation")


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


NOT_YET = "*Not measured yet.*"


ENGINES = {"vllm": "vLLM", "llama.cpp": "llama.cpp", "litgpt": "LitGPT",
           "ctranslate2": "CTranslate2", "mistral.rs": "mistral.rs"}  # fmt: skip
UNKNOWN = re.compile("No conversion is registered|architecture unknown|Unsupported Hugging Face")


def engines() -> str:
    """Greedy tokens that are transformers', by checkpoint and engine; letters say why not."""
    rows = {(row["case"], row["engine"]): row for row in results("engines", "case", "engine")}
    letters: dict[str, str] = {}

    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        equal = f"{row['equal']} of {row['compared']}"
        if row["status"] == "same":
            return equal
        why = _why(row)
        letter = letters.setdefault(why, chr(ord("a") + len(letters)))
        return f"{equal} ({letter})" if row["status"] == "differs" else f"no ({letter})"

    cases = sorted({case for case, _ in rows}, key=lambda case: ("SmolLM2" not in case, case))
    lines = [[case, *(cell(rows.get((case, name))) for name in ENGINES)] for case in cases]
    notes = "\n".join(f"- ({letter}) {why}" for why, letter in letters.items())
    versions = {ENGINES[row["engine"]]: row["version"] for row in rows.values()}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    reference = ", ".join(sorted({row["reference"] for row in rows.values()}))
    return (
        table(("checkpoint", *ENGINES.values()), lines, left=len(ENGINES) + 1)
        + f"\n\n{notes}\n\n{reference}; {told}."
        + measured(list(rows.values()))
    )


def _why(row: Row) -> str:
    """Why an engine gives no tokens or others, in few words."""
    if row["status"] == "differs":
        gaps = [each["gap"] for each in row["differences"]]
        far = "far" if None in gaps else f"up to {max(gaps):.2g}"
        return f"first differences at logits {far} apart"
    if UNKNOWN.search(row["why"]):
        return "architecture unknown to it"
    words = re.sub(r"/\S*/", "", row["why"]).replace("<", "‹").replace("`", "")
    return words if len(words) < 120 else f"{words[:120]}…"


WAYS = ("sdpa", "sdpa-grouped", "repeat", "matmul")
TABLES: dict[str, Callable[[], str]] = {
    "decoding": decoding,
    "kept": kept,
    "decode-16k": lambda: attention("attention", "KV heads", WAYS, context=16384),
    "decode-4k": lambda: attention("attention", "KV heads", WAYS, context=4096),
    "decode-heads-of-64": lambda: attention(
        "attention_other", "KV heads of 64", WAYS[:3], head_dim=64, context=16384
    ),
    "decode-batch-8": lambda: attention(
        "attention_other", "KV heads, batch 8", WAYS[:2], batch=8
    ),
    "decode-32k": lambda: attention(
        "attention_other", "KV heads, 32,768 tokens", (*WAYS[:2], "flex"), context=32768
    ),
    "prompts": prompts,
    "slope": slope,
    "profile": profile,
    "serving-smollm2": lambda: serving("SmolLM2"),
    "serving-tinyllama": lambda: serving("TinyLlama"),
    "serving-memory": serving_memory,
    "serving-short": serving_in_short,
    "whole-step": whole_step,
    "planning": planning,
    "planning-cases": planning_cases,
    "caches": caches,
    "folding": folding,
    "energies": energies,
    "healing": healing,
    "healing-small": healing_small,
    "memory": memory,
    "engines": engines,
}  # fmt: skip


def filled(page: str) -> str:
    """A page with the tables that its places name."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args()
    others = [page for page in PAGES if filled(text := page.read_text("utf-8")) != text]
    if arguments.check:
        sys.exit("\n".join(f"{page.name}: not what the results say" for page in others) or 0)
    for page in others:
        write_text(page, filled(page.read_text("utf-8")))


if __name__ == "__main__":
    main()
