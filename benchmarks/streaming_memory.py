"""Peak memory of `kvfold convert` on a checkpoint of several gigabytes.

    python benchmarks/streaming_memory.py work

makes a random Llama checkpoint (2.4 B parameters, bfloat16, 4.8 GB in shards of 1 GB, MHA),
folds it to a quarter of its KV heads in a process of its own with each data-free method, and
checks the peak against 2 x the largest shard + 500 MB. One calibrated run (`pca`, 2,048 tokens)
shows that one layer is held, not the model. Appends to ``streaming_memory.jsonl``.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from fold_quality import machine
from kvfold.checkpoint.tensors import TensorSpec, write_tensors
from kvfold.files import append_text, write_text

CONFIG = LlamaConfig(
    hidden_size=2560,
    intermediate_size=6912,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=20,
    vocab_size=32000,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)
SHARD_BYTES = 10**9
RESULTS = Path(__file__).with_suffix(".jsonl")


def specs(config: LlamaConfig) -> Iterator[TensorSpec]:
    """The tensors of such a Llama, MHA, in order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield TensorSpec("model.embed_tokens.weight", "BF16", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            yield TensorSpec(f"{prefix}self_attn.{name}_proj.weight", "BF16", (hidden, hidden))
        for name in ("gate", "up"):
            yield TensorSpec(f"{prefix}mlp.{name}_proj.weight", "BF16", (inner, hidden))
        yield TensorSpec(f"{prefix}mlp.down_proj.weight", "BF16", (hidden, inner))
        for name in ("input", "post_attention"):
            yield TensorSpec(f"{prefix}{name}_layernorm.weight", "BF16", (hidden,))
    yield TensorSpec("model.norm.weight", "BF16", (hidden,))
    yield TensorSpec("lm_head.weight", "BF16", (config.vocab_size, hidden))


def make_source(folder: Path, config: LlamaConfig = CONFIG, words: int = 1) -> int:
    """Write the checkpoint, whose tokenizer knows ``word0`` and so on; return the size of its
    largest shard."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs(config):
        if sum(s.nbytes for s in shards[-1]) + spec.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if not folder.exists():
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        for file, shard in zip(files, shards, strict=True):
            write_tensors(folder / file, shard, (random_tensor(spec) for spec in shard))
        weight_map = {s.name: f for f, shard in zip(files, shards, strict=True) for s in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index))
        save_tokenizer(folder, words)
    return max((folder / file).stat().st_size for file in files)


def random_tensor(spec: TensorSpec) -> torch.Tensor:
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=torch.bfloat16)
    return torch.empty(spec.shape, dtype=torch.bfloat16).normal_(std=0.02)


def save_tokenizer(folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {f"word{i}": i for i in range(1, words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)


def measure(source: Path, out: Path, *options: str) -> dict[str, object]:
    """Fold in a fresh process and return its record."""
    shutil.rmtree(out, ignore_errors=True)
    command = ["convert", str(source), str(out), "--kv-heads", "5", "--json", *options]
    result = subprocess.run(
        [sys.executable, "-m", "kvfold", *command], check=True, capture_output=True, text=True
    )
    shutil.rmtree(out)
    record: dict[str, object] = json.loads(result.stdout)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", help="one case")
    arguments = parser.parse_args()
    largest = make_source(arguments.work / "large")
    limit = 2 * largest + 500 * 10**6
    text = arguments.work / "words.txt"
    write_text(text, "word " * 4000)
    calibrated = ("--fit", "none", "--calibration", str(text), "--calibration-tokens", "2048")
    cases = {
        "mean": ("--method", "mean"),
        "pca, data-free": ("--method", "pca", "--no-calibration"),
        "pca, calibrated": ("--method", "pca", *calibrated),
    }
    for name, options in cases.items():
        if arguments.only not in (None, name):
            continue
        run = measure(arguments.work / "large", arguments.work / "out", *options)["run"]
        assert isinstance(run, dict)
        line = {
            "benchmark": "streaming_memory", "case": name, **machine(), "run": run,
            "largest_shard_bytes": largest, "limit_bytes": limit,
        }  # fmt: skip
        append_text(RESULTS, json.dumps(line) + "\n")
        peak = run["peak_memory_bytes"]
        print(f"| {name} | {peak / 1e9:.2f} GB | {limit / 1e9:.2f} GB | {run['seconds']:.0f} s |")


if __name__ == "__main__":
    main()
