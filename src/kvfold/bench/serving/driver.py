"""One vLLM engine, told over pipes what to measure. It runs in vLLM's environment, by its path.

``python driver.py SETTINGS`` starts an engine and says what it is; then it answers each line of
JSON on its input by one on its output: the steps that the engine took. So nothing of kvfold is
imported here, and nothing is worked out: ``steps.py`` does that.

The engine lives in this process, and each request is put into it and each step taken from here,
so that nothing but the engine takes time. Decoding is measured in the way of vLLM's own
``DecodeBenchConnector``: the cache is filled with made-up values once, and all but the last token
of a prompt counts as computed. Prompts whose prefill is to be measured are computed.
"""

import json
import os
import random
import sys
import time
from typing import Any, TextIO

COMPUTED = "computed"  # begins the names of requests whose prompts are not made up
FILL = {"fill_mean": 0.015, "startup_fill": True}  # the mean is vLLM's default


def connector() -> dict[str, Any]:
    """vLLM's connector that makes prompts up, with an exception."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import decode_bench_connector

    class MadeUp(decode_bench_connector.DecodeBenchConnector):  # type: ignore[misc]
        """Makes up all prompts but those of requests that are called computed."""

        def get_num_new_matched_tokens(self, request: Any, computed: int) -> Any:
            if request.request_id.startswith(COMPUTED):
                return 0, False
            return super().get_num_new_matched_tokens(request, computed)

    globals()["MadeUp"] = MadeUp  # where vLLM finds it
    return {
        "kv_connector": "MadeUp",
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
        "kv_connector_extra_config": FILL,
    }


class Watch:
    """How many requests the engine had in hand after its latest step, told by the engine."""

    in_hand = 0

    def __init__(self, *given: Any, **more: Any) -> None: ...

    def record(self, scheduler_stats: Any, *given: Any, **more: Any) -> None:
        """Keep the number."""
        if scheduler_stats is not None:
            Watch.in_hand = scheduler_stats.num_running_reqs

    def log(self) -> None:
        """Nothing."""

    def log_engine_initialized(self) -> None:
        """Nothing."""


class Engine:
    """A vLLM engine, and the names of its requests."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine

        made_up = {"kv_transfer_config": connector()} if settings["made_up"] else {}
        arguments = EngineArgs(**settings["arguments"], **made_up)
        self._engine = LLMEngine.from_engine_args(arguments, stat_loggers=[Watch])
        self._count = 0

    def described(self) -> dict[str, Any]:
        """What it is, and how many tokens its cache holds."""
        import torch
        import vllm

        config = self._engine.vllm_config
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cache_tokens": config.cache_config.kv_cache_size_tokens,
            "vocabulary": config.model_config.get_vocab_size(),
        }

    def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Serve some requests, all there from the start.

        Returns:
            ``steps``: for each, its seconds and how many requests were given a token, were given
            their first, and were in hand or finished. ``first``: the first token of each request.
        """
        names = [self._add(number, asked) for number in range(asked["concurrency"])]
        first, steps = dict[str, int](), list[list[float]]()
        before = time.perf_counter()
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            begun = [out for out in outputs if out.request_id not in first]
            first |= {out.request_id: out.outputs[0].token_ids[0] for out in begun}
            finished = sum(out.finished for out in outputs)
            steps.append([now - before, len(outputs), len(begun), Watch.in_hand + finished])
            before = now
        return {"steps": steps, "first": [first[name] for name in names]}

    def _add(self, number: int, asked: dict[str, Any]) -> str:
        from vllm import SamplingParams

        self._count += 1
        name = f"{COMPUTED if asked['computed'] else 'made up'} {self._count}"
        drawn = random.Random(f"{asked['seed']} {number}")
        words = drawn.choices(range(asked["vocabulary"]), k=asked["context"])
        greedy = SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=asked["output"], detokenize=False
        )
        self._engine.add_request(name, {"prompt_token_ids": words}, greedy)
        return name


def answer(out: TextIO, found: dict[str, Any]) -> None:
    """One line."""
    out.write(json.dumps(found) + "\n")
    out.flush()


def main() -> None:
    """Start an engine, and answer until the input ends."""
    sys.path.pop(0)  # this file's folder: its neighbours are no modules of vLLM's
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is talk
    engine = Engine(json.loads(sys.argv[1]))
    answer(out, engine.described())
    for line in sys.stdin:
        answer(out, engine.run(json.loads(line)))


if __name__ == "__main__":
    main()
