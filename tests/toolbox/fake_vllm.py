"""A vLLM that computes nothing: it schedules requests, and a clock of its own goes on.

``installed`` puts it where a Python finds it as ``vllm``, with kvfold's plugin beside it. What
steps take is arithmetic, so tests know what a benchmark must find:

- every step takes ``STEP`` seconds, and ``PREFILL`` for each prompt token that is computed;
- each token of context of each sequence adds ``OWN`` (vLLM's attention), or ``KVFOLD`` times the
  bits of the cache;
- with ``"starts_differ"`` in its config, the n-th start of a model takes n times ``STEP``.

Beside the config, ``starts.log`` says when engines began and ended.
"""

import atexit
import importlib
import json
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

STEP, PREFILL, OWN, KVFOLD = 2.0**-7, 2.0**-13, 2.0**-18, 2.0**-23
BITS = {"auto": 16, "fp8": 8, "int8_per_token_head": 8, "int4_per_token_head": 4}
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector"
__version__ = "0.0"


def installed(folder: Path, plugin: bool = True) -> Path:
    """A folder that makes this module ``vllm`` for a Python that has it in its path."""
    (folder / "vllm").mkdir(parents=True)
    shutil.copy(__file__, folder / "vllm" / "__init__.py")
    (folder / "torch.py").write_text("__version__ = '0.0'\ndef get_num_threads(): return 3\n")
    if plugin:
        about = folder / "fake-0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Name: fake\nVersion: 0\n")
        (about / "entry_points.txt").write_text("[vllm.general_plugins]\nx = kvfold.vllm:y\n")
    return folder


class DecodeBenchConnector:
    """Says that all but the last token of every prompt are computed."""

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        return len(request.prompt) - computed - 1, False


class EngineArgs:
    def __init__(self, **given: Any) -> None:
        vars(self).update(given)
        self.backend = given.get("attention_backend")
        self.transfer = given.get("kv_transfer_config")


class SamplingParams:
    def __init__(self, **given: Any) -> None:
        assert given["temperature"] == 0
        assert given["ignore_eos"]
        self.max_tokens = given["max_tokens"]


class Request:
    def __init__(self, name: str, prompt: list[int], output: int) -> None:
        self.request_id, self.prompt, self.output = name, prompt, output
        self.computed = self.made = 0

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.output


class LLMEngine:
    def __init__(self, arguments: Any, loggers: list[Any]) -> None:
        if arguments.backend not in (None, "KVFOLD"):
            raise ValueError(f"Unknown attention backend: {arguments.backend}")
        config = json.loads((Path(arguments.model) / "config.json").read_text())
        if config.get("broken"):
            raise ValueError("this model is broken")
        began = _logged(Path(arguments.model) / "starts.log")
        self.step_seconds = STEP * (began if config.get("starts_differ") else 1)
        bits = BITS[arguments.kv_cache_dtype]
        heads = config["num_hidden_layers"] * config["num_key_value_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.arguments = arguments
        self.tokens = arguments.kv_cache_memory_bytes * 8 // (2 * heads * head_dim * bits)
        self.each = KVFOLD * bits if arguments.backend else OWN
        self.connector = self._connector()
        self.loggers = [kind(None) for kind in loggers]
        self.waiting, self.running = list[Request](), list[Request]()
        size = SimpleNamespace(get_vocab_size=lambda: config["vocab_size"])
        cache = SimpleNamespace(kv_cache_size_tokens=self.tokens)
        self.vllm_config = SimpleNamespace(cache_config=cache, model_config=size)

    @classmethod
    def from_engine_args(cls, arguments: Any, stat_loggers: list[Any]) -> "LLMEngine":
        return cls(arguments, stat_loggers)

    def _connector(self) -> Any:
        found = self.arguments.transfer
        if found is None:
            return SimpleNamespace(get_num_new_matched_tokens=lambda request, computed: (0, False))
        module = importlib.import_module(found["kv_connector_module_path"])
        return getattr(module, found["kv_connector"])()

    def add_request(self, name: str, prompt: Any, params: SamplingParams) -> None:
        words = prompt["prompt_token_ids"]
        assert len(words) + params.max_tokens <= self.arguments.max_model_len
        self.waiting.append(Request(name, words, params.max_tokens))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Any]:
        while self.waiting and len(self.running) < self.arguments.max_num_seqs:
            held = sum(request.longest for request in self.running)
            if held + self.waiting[0].longest > self.tokens:
                break
            request = self.waiting.pop(0)
            request.computed, _ = self.connector.get_num_new_matched_tokens(request, 0)
            self.running.append(request)
        budget, given = self.arguments.max_num_batched_tokens, list[Request]()
        seconds = self.step_seconds
        for request in self.running:
            left = len(request.prompt) + request.made - request.computed
            now = min(left, budget)
            budget -= now
            request.computed += now
            decodes = request.made > 0 or left == 1
            seconds += self.each * request.computed if decodes else PREFILL * now
            if now == left:
                request.made += 1
                given.append(request)
        CLOCK[0] += seconds
        done = [request for request in given if request.made == request.output]
        self.running = [request for request in self.running if request not in done]
        for each in self.loggers:
            each.record(scheduler_stats=SimpleNamespace(num_running_reqs=len(self.running)))
        return [_output(request, request in done) for request in given]


def _logged(log: Path) -> int:
    """How often an engine began, this time included; it is told when this one ends."""

    def say(word: str) -> None:
        with log.open("a") as file:
            file.write(f"{word}\n")

    say("begin")
    atexit.register(say, "end")
    return log.read_text().count("begin")


def _output(request: Request, finished: bool) -> Any:
    token = sum(request.prompt) % 1000
    outputs = [SimpleNamespace(token_ids=[token] * request.made)]
    return SimpleNamespace(request_id=request.request_id, outputs=outputs, finished=finished)


CLOCK = [0.0]
if __name__ == "vllm":  # somebody measures: time goes on as said above
    time.perf_counter = lambda: CLOCK[0]
    parents = CONNECTOR.split(".")[1:]
    for end in range(len(parents)):
        name = ".".join(("vllm", *parents[: end + 1]))
        module = ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules[CONNECTOR].DecodeBenchConnector = DecodeBenchConnector  # type: ignore[attr-defined]
    above = sys.modules[CONNECTOR.rpartition(".")[0]]
    above.decode_bench_connector = sys.modules[CONNECTOR]  # type: ignore[attr-defined]
