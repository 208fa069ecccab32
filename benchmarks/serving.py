"""Serving through vLLM: kvfold's attention and vLLM's own, source and folded, in turn.

    python -m venv VENV && VENV/bin/pip install 'kvfold[vllm]'   # where vLLM is, kvfold is too
    python benchmarks/serving.py VENV/bin/python                 # everything: hours on 2 cores
    python benchmarks/serving.py VENV/bin/python --models smollm2 --parts load --concurrency 1

Models have the shapes of SmolLM2-135M and TinyLlama-1.1B (``smollm2``, ``tinyllama``), and those
that folding makes of them; weights are made up, for speed does not depend on them, and so are
positions beyond TinyLlama's 2,048. Engines of a source and one model folded from it are there at
once and take turns; see ``kvfold bench serve`` for how decoding and prefill are told apart.

``load``: contexts and concurrencies, memory enough for all. ``memory``: 16 requests of 4,096 tokens
where the source's bf16 cache holds two, and every engine has the same memory. Rows are added to
``serving.jsonl`` beside this file, one pair of models and part at a time.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvfold.arch.decoder import describe
from kvfold.bench.results import save
from kvfold.bench.serving.request import CACHES, ServeRequest
from kvfold.bench.serving.run import run_serve

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
         "max_position_embeddings": 8192, "rope_theta": 100000.0, "hidden_act": "silu",
         "rms_norm_eps": 1e-5}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "tinyllama": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
KV_HEADS = {"smollm2": (3, 1), "tinyllama": (4, 2, 1)}  # the source's first
NAMES = {"smollm2": "SmolLM2-135M", "tinyllama": "TinyLlama-1.1B"}
SHORT_OF_MEMORY = {"context": 4096, "concurrency": 16, "held": 2}
RESULTS = Path(__file__).with_suffix(".jsonl")


def config(name: str, kv_heads: int) -> dict[str, Any]:
    """The config of a model, folded to so many heads."""
    return LLAMA | SHAPES[name] | {"num_key_value_heads": kv_heads}


def pairs(name: str, wanted: str | None, work: Path) -> Iterator[tuple[str, str]]:
    """Folders with the configs of a model: the source, and each that it is folded to."""
    source, *folded = KV_HEADS[name]
    path = folder(work / NAMES[name], name, source)
    for count in folded if wanted is None else map(int, wanted.split(",")):
        yield path, folder(work / f"{NAMES[name]}-{count}", name, count)


def folder(path: Path, name: str, kv_heads: int) -> str:
    """A folder with a config alone."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config(name, kv_heads)), encoding="utf-8")
    return str(path)


def requests(name: str, pair: tuple[str, str], asked: argparse.Namespace) -> Iterator[ServeRequest]:
    """What to measure of a model and what it is folded to."""
    given: dict[str, Any] = {
        "paths": pair, "python": asked.python, "rounds": asked.rounds,
        "output": asked.output, "random_weights": True, "eager": asked.eager,
        "threads": asked.threads, "caches": asked.formats.split(","), "starts": asked.starts,
    }  # fmt: skip
    if "load" in asked.parts.split(","):
        yield ServeRequest(
            **given,
            contexts=tuple(map(int, asked.contexts.split(","))),
            concurrencies=tuple(map(int, asked.concurrency.split(","))),
        )
    if "memory" in asked.parts.split(","):
        context, held = SHORT_OF_MEMORY["context"], SHORT_OF_MEMORY["held"]
        each = describe(config(name, KV_HEADS[name][0])).kv_bytes_per_token()
        yield ServeRequest(
            **given, contexts=(context,), concurrencies=(SHORT_OF_MEMORY["concurrency"],),
            memory=int((held + 0.5) * each * (context + asked.output)),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", help="that has vLLM and kvfold")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument(
        "--folded", help="KV heads of the folded models; SmolLM2: 1, TinyLlama: 2,1"
    )
    parser.add_argument("--parts", default="load,memory")
    parser.add_argument("--contexts", default="512,4096,7900")
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--formats", default="bf16,int8,int4", help=f"of {', '.join(CACHES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, help="of each engine, alone; default: all in turn")
    parser.add_argument("--output", type=int, default=32, help="tokens that a request decodes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--eager", action="store_true", help="do not compile the models")
    asked = parser.parse_args()
    for name in asked.models.split(","):
        with tempfile.TemporaryDirectory() as work:
            for pair in pairs(name, asked.folded, Path(work)):
                for request in requests(name, pair, asked):
                    results = run_serve(request, progress=lambda *told: print(*told, flush=True))
                    save(results, RESULTS)


if __name__ == "__main__":
    main()
