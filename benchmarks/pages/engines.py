"""The table of checkpoints that engines open, and of why some do not."""

import re

from pages.rows import Row, measured, results, table

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
