"""The tables of the benchmarks' pages, from what the benchmarks wrote.

    python benchmarks/tables.py            # after a benchmark: puts its numbers into the pages
    python benchmarks/tables.py --check    # exits with 1 where a page has others

Of results with the same case the last counts. A table stands in a page between ``<!-- table NAME
-->`` and ``<!-- end -->``; its last line says when and where it was measured.
"""

import argparse
import re
import sys
from collections.abc import Callable

from kvfold.files import write_text
from pages.decoding import (
    attention,
    decoding,
    latent_steps,
    profile,
    prompts,
    sharing,
    slope,
    whole_latent_step,
    whole_step,
)
from pages.engines import engines
from pages.eviction import (
    combined,
    eviction_gemma,
    eviction_needles,
    eviction_quality,
    eviction_steps,
    recall,
)
from pages.planning import planning, planning_cases
from pages.quality import (
    caches,
    energies,
    folding,
    healing,
    healing_small,
    kept,
    latents,
    local_tasks,
    memory,
    own_text,
    qk_norm,
)
from pages.rows import FOLDER
from pages.selection import selection_needles, selection_quality, selection_steps
from pages.serving import serving, serving_in_short, serving_memory, serving_starts

ROOT = FOLDER.parent
PAGES = (
    FOLDER / "README.md", FOLDER / "LOG.md", ROOT / "README.md", ROOT / "docs" / "serving.md",
)  # fmt: skip
PLACE = re.compile(r"(<!-- table ([\w-]+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)

WAYS = ("sdpa", "sdpa-grouped", "repeat", "matmul")
TABLES: dict[str, Callable[[], str]] = {
    "decoding": decoding,
    "kept": kept,
    "sharing": sharing,
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
    "latent-steps": latent_steps,
    "prompts": prompts,
    "slope": slope,
    "profile": profile,
    "serving-smollm2": lambda: serving("SmolLM2"),
    "serving-tinyllama": lambda: serving("TinyLlama"),
    "serving-memory": serving_memory,
    "serving-short": serving_in_short,
    "serving-starts": serving_starts,
    "whole-step": whole_step,
    "latent-step": whole_latent_step,
    "eviction-steps": eviction_steps,
    "eviction-quality": eviction_quality,
    "eviction-gemma": eviction_gemma,
    "eviction-needles": eviction_needles,
    "combined": combined,
    "recall": recall,
    "selection-steps": selection_steps,
    "selection-quality": selection_quality,
    "selection-needles": selection_needles,
    "planning": planning,
    "planning-cases": planning_cases,
    "caches": caches,
    "folding": folding,
    "latents": latents,
    "qk-norm": qk_norm,
    "energies": energies,
    "healing": healing,
    "healing-small": healing_small,
    "local-tasks": local_tasks,
    "memory": memory,
    "own-text": own_text,
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
