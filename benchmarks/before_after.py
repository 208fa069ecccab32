"""Attention of this checkout against that of another one: what a change costs or gains.

    git worktree add ../before HEAD~20
    pip install --no-deps -e ../before && pip install --no-deps -e .  # builds the kernels of both
    OMP_NUM_THREADS=1 python benchmarks/before_after.py ../before     # about 4 minutes

Processes of each checkout take turns, case by case and sample by sample, so drift of the machine
meets both alike; there are several pairs of them, as where a process's memory happens to lie makes
some cases up to 5% faster or slower for as long as it lives (with as many threads as cores, 10%).
What is told is this checkout's time over the other's, the median of all samples and their
quartiles: 1.00 is no change, above is slower. Only names that both have are used: the public ones.
``--only`` chooses cases whose names hold a word; ``--at-most 1.03`` exits with 3 if the lower
quartile of any case is above. Appends to ``before_after.jsonl`` beside this
file.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).with_suffix(".jsonl")
SAMPLE = 0.05  # seconds, at least
FORMATS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
Case = Callable[[], object]


def cases() -> dict[str, Callable[[], Case]]:
    """What is timed, by name; each makes its tensors when it is called."""
    made: dict[str, Callable[[], Case]] = {
        "attention, 1 query, 16 keys": partial(_plain, 1, 16),
        "attention, 1 query, 128 keys": partial(_plain, 1, 128),
        "attention, 1 query, 4096 keys": partial(_plain, 1, 4096),
        "attention, 1 query, 4096 keys, all options": partial(_bent, 4096),
        "attention, 512 queries": partial(_plain, 512, 512),
        "explain": _explained,
    }
    for fmt in FORMATS:
        for heads in (8, 1):
            for tokens in (64, 256, 8192):
                made[f"decode, {fmt}, 32:{heads}, {tokens} tokens"] = partial(
                    _decode, fmt, heads, tokens
                )
        for tokens in (1, 512):
            made[f"append, {fmt}, {tokens} tokens"] = partial(_append, fmt, tokens)
    for fmt in ("bf16", "int4"):
        for kind in ("paged", "sliding"):
            made[f"decode, {fmt}, {kind}, 4096 tokens"] = partial(_decode, fmt, 8, 4096, kind)
        made[f"decode, {fmt}, batch 8, ragged"] = partial(_ragged, fmt)
        made[f"transformers, 1 token, {fmt}"] = partial(_drop_in, fmt)
    made["layer, 1 token"] = partial(_layer, 1)
    made["layer, 128 tokens"] = partial(_layer, 128)
    made["varlen, 8 sequences"] = _varlen
    return made


def _random(*shape: int, dtype: Any = None) -> Any:
    import torch

    return torch.randn(*shape, dtype=torch.float32).to(dtype or torch.bfloat16)


def _plain(queries: int, keys: int) -> Case:
    import kvfold

    q, k, v = _random(1, 32, queries, 128), _random(1, 8, keys, 128), _random(1, 8, keys, 128)
    return lambda: kvfold.attention(q, k, v)


def _bent(keys: int) -> Case:
    import torch

    import kvfold

    q, k, v = _random(1, 32, 1, 128), _random(1, 8, keys, 128), _random(1, 8, keys, 128)
    options: dict[str, Any] = {
        "window": keys // 2, "sinks": 4, "softcap": 30.0, "scale": 0.1,
        "start": torch.zeros(1, dtype=torch.int32), "mask": torch.zeros(1, 1, 1, keys),
        "alibi_slopes": torch.full((32,), 0.01), "sink_logits": torch.zeros(32),
    }  # fmt: skip
    return lambda: kvfold.attention(q, k, v, **options)


def _explained() -> Case:
    import kvfold

    q, k, v = _random(1, 32, 1, 128), _random(1, 8, 64, 128), _random(1, 8, 64, 128)
    return lambda: kvfold.explain(q, k, v)


def _cache(fmt: str, kv_heads: int, kind: str = "contiguous", batch: int = 1) -> Any:
    import kvfold

    window: dict[str, Any] = {"window": 1024, "sinks": 4} if kind == "sliding" else {}
    return kvfold.KVCache(kv_heads, 128, dtype=fmt, kind=kind, batch=batch, **window)


def _decode(fmt: str, kv_heads: int, tokens: int, kind: str = "contiguous") -> Case:
    cache = _cache(fmt, kv_heads, kind)
    cache.append(_random(1, kv_heads, tokens, 128), _random(1, kv_heads, tokens, 128))
    q = _random(1, 32, 1, 128)
    return lambda: cache.attend(q)


def _append(fmt: str, tokens: int) -> Case:
    cache = _cache(fmt, 8, "paged")
    k, v = _random(1, 8, tokens, 128), _random(1, 8, tokens, 128)

    def call() -> None:
        if cache.lengths[0] > 8192:
            cache.clear()
        cache.append(k, v)

    return call


def _ragged(fmt: str) -> Case:
    cache = _cache(fmt, 8, "paged", batch=8)
    for b in range(8):
        tokens = 100 + 250 * b
        cache.append(_random(1, 8, tokens, 128), _random(1, 8, tokens, 128), [b])
    q = _random(8, 32, 1, 128)
    return lambda: cache.attend(q)


def _layer(tokens: int) -> Case:
    import torch

    from kvfold.nn import GroupedQueryAttention

    layer = GroupedQueryAttention(1024, 16, 4).to(torch.bfloat16).eval()
    x = _random(1, tokens, 1024)

    @torch.no_grad()
    def call() -> object:
        return layer(x)

    return call


def _varlen() -> Case:
    import torch

    import kvfold

    begins = torch.arange(0, 9 * 64, 64, dtype=torch.int32)
    q, k, v = _random(512, 32, 128), _random(512, 8, 128), _random(512, 8, 128)
    return lambda: kvfold.attention_varlen(q, k, v, begins, begins, causal=True)


def _drop_in(fmt: str) -> Case:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import kvfold.transformers as drop_in

    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.set_attn_implementation("kvfold")
    cache = drop_in.KVCache(config, dtype=fmt)
    ids = torch.randint(0, 256, (1, 512))

    @torch.no_grad()
    def call() -> None:
        model(ids[:, :1], past_key_values=cache)
        cache.crop(-1)

    with torch.no_grad():
        model(ids, past_key_values=cache)
    return call


def serve() -> None:
    """Time what standard input asks for: the name of a case, then numbers of calls."""
    import torch

    torch.manual_seed(0)
    known = cases()
    call: Case = list
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, str):
            call = known[asked]()
            for _ in range(3):
                call()
            answer = 0.0
        else:
            start = perf_counter()
            for _ in range(asked):
                call()
            answer = (perf_counter() - start) / asked
        print(json.dumps(answer), flush=True)


class Server:
    """A process with one checkout's kvfold."""

    def __init__(self, checkout: Path) -> None:
        source = checkout.resolve() / "src"
        if not (source / "kvfold").is_dir():
            raise SystemExit(f"{checkout} is no checkout of kvfold")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(source)}, text=True,
        )  # fmt: skip

    def ask(self, what: str | int) -> float:
        """Prepare a case by its name, or time so many calls of it: seconds each."""
        to, found = self.process.stdin, self.process.stdout
        assert to is not None
        assert found is not None
        print(json.dumps(what), file=to, flush=True)
        return float(json.loads(found.readline()))


def compare(name: str, before: Server, after: Server, rounds: int) -> list[float]:
    """This checkout's time over the other's, in each round."""
    for server in (before, after):
        server.ask(name)
    calls = 1
    while (seconds := before.ask(calls) * calls) < SAMPLE:
        calls = max(calls + 1, int(1.2 * calls * SAMPLE / max(seconds, SAMPLE / 10)))
    after.ask(calls)
    ratios = []
    for index in range(rounds):
        pair = (before, after) if index % 2 else (after, before)
        times = {server: server.ask(calls) for server in pair}
        ratios.append(times[after] / times[before])
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each pair of processes")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes")
    parser.add_argument("--at-most", type=float, help="exit with 3 above this")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    if arguments.before is None:
        parser.error("name the checkout to compare with")
    here = Path(__file__).parents[1]
    pairs = [(Server(arguments.before), Server(here)) for _ in range(arguments.pairs)]
    found: dict[str, list[float]] = {}
    print(f"{'case':44}  median  quartiles")
    for name in cases():
        if arguments.only in name:
            ratios = [x for pair in pairs for x in compare(name, *pair, arguments.rounds)]
            found[name] = low, median, high = quantiles(ratios, n=4, method="inclusive")
            print(f"{name:44}  {median:6.3f}  {low:.3f} {high:.3f}", flush=True)
    record(found, arguments)
    slower = [name for name, (low, _, _) in found.items() if low > (arguments.at_most or 1e9)]
    return 3 if slower else 0


def record(found: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    """Append a line with the machine to the results."""
    from kvfold.bench.this_machine import described

    def commit(checkout: Path) -> str:
        command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    line = {
        "benchmark": "before_after", "date": date.today().isoformat(),
        "machine": f"{described(0)['cpu']}, {os.cpu_count()} cores",
        "before": commit(arguments.before), "after": commit(Path(__file__).parent),
        "rounds": arguments.rounds, "pairs": arguments.pairs, "ratios": found,
    }  # fmt: skip
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
