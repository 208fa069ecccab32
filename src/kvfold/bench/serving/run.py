"""Checkpoints served by several engines that take turns, case by case, or are alone in turn."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kvfold.bench.buffers import read, threads
from kvfold.bench.model import kv_bytes_expected
from kvfold.bench.results import Results, Row
from kvfold.bench.serving.engine import Asked, Engine
from kvfold.bench.serving.request import CACHES, DTYPES, VLLM, Server, ServeRequest, decoder_of
from kvfold.bench.serving.steps import Decoding, first_token, slope
from kvfold.bench.this_machine import described, is_cold
from kvfold.bench.timing import Spread, Timing, ratio
from kvfold.progress import Progress, no_progress
from kvfold.record import command_line

_WARM = Asked(concurrency=1, context=64, output=4, computed=True, seed=0)
_BATCHED_TOKENS = 2048  # of one step: what `vllm serve` takes on a CPU


@dataclass
class Measured:
    """What a server did in one group.

    Attributes:
        decoding: by context and concurrency, a sample each. reading: the seconds that reading took
            beside it. first: by context, seconds until the first token. tokens: those tokens.
    """

    decoding: dict[tuple[int, int], list[Decoding]] = field(default_factory=dict)
    reading: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    first: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def add(self, start: "Measured") -> None:
        """What an engine did from one start to its end, as one sample of each case."""
        for case, found in start.decoding.items():
            seconds = median(each.seconds for each in found)
            whole = Decoding(seconds, max(each.running for each in found))
            self.decoding.setdefault(case, []).append(whole)
            self.reading.setdefault(case, []).append(median(start.reading[case]))
        for context, taken in start.first.items():
            self.first.setdefault(context, []).append(median(taken))
            self.tokens.setdefault(context, []).extend(start.tokens[context])

    def speed(self, case: tuple[int, int]) -> Spread:
        """Tokens per second."""
        return Spread.of([each.tokens_per_second for each in self.decoding[case]])

    def until_first(self, context: int) -> Timing:
        """Seconds until the first token of one request alone."""
        return Timing.of(self.first[context])

    def slope(self, contexts: tuple[int, ...], concurrency: int) -> Spread | None:
        """Seconds that each token of context adds to a step."""
        by_context = [self.decoding[context, concurrency] for context in contexts]
        return slope(contexts, list(zip(*by_context, strict=True)))

    def agreeing(self, other: "Measured") -> float:
        """The share of first tokens that are the other's."""
        pairs = [
            pair
            for context, found in self.tokens.items()
            for pair in zip(found, other.tokens[context], strict=True)
        ]
        return sum(a == b for a, b in pairs) / len(pairs)


def run_serve(request: ServeRequest, *, progress: Progress = no_progress) -> Results:
    """Serve every checkpoint with every attention and cache format.

    >>> run_serve(ServeRequest(["folder"], contexts=[512], python="venv/bin/python"))
    ... # doctest: +SKIP
    """
    return _Run(request, progress).results()


class _Run:
    """The engines that are there, and what they did."""

    def __init__(self, request: ServeRequest, progress: Progress) -> None:
        self._request = request
        self._progress = progress
        self._engines: dict[Server, Engine] = {}
        self._about: dict[Server, dict[str, Any]] = {}
        self._cases = [(n, c) for c in request.concurrencies for n in request.contexts]
        self._groups = list(request.groups())
        turns = (request.starts or 1) * request.rounds * (len(request.contexts) + len(self._cases))
        self._samples = turns * sum(map(len, self._groups))
        self._done = 0

    def results(self) -> Results:
        """Measure group after group; an engine that the next needs too goes on."""
        request, rows = self._request, dict[tuple[Server, tuple[int, int]], Row]()
        with ExitStack() as stack:
            count = stack.enter_context(threads(request.threads))
            stack.callback(self._close, ())
            self._data = torch.ones(request.working_set // 8 + 1, dtype=torch.int64)
            for group in self._groups:
                found = self._together(group) if request.starts is None else self._alone(group)
                rows = self._rows(group, found) | rows
        about = next(iter(self._about.values()))
        machine = described(count) | {name: about[name] for name in ("vllm", "torch", "threads")}
        order = sorted(rows, key=lambda key: (self._cases.index(key[1]), self._place(key[0])))
        command = command_line(request, brief=True)
        return Results(command, machine, tuple(rows[key] for key in order))

    def _place(self, server: Server) -> tuple[int, bool, int]:
        """Where a server stands in a table."""
        paths = list(self._request.paths)
        return (
            paths.index(server.path),
            server.attention != VLLM,
            list(CACHES).index(server.cache),
        )

    def _close(self, stay: "list[Server] | tuple[()]") -> None:
        for server in set(self._engines) - set(stay):
            self._engines.pop(server).close()

    def _open(self, group: list[Server]) -> None:
        for number, server in enumerate(group):
            self._progress("engines", number, len(group))
            if server not in self._engines:
                name = f"{Path(server.path).name}, {server.implementation}"
                engine = Engine(name, self._request.interpreter, self._settings(server))
                self._engines[server] = engine
                self._about[server] = engine.about
                engine.ask(_WARM)
        self._progress("engines", len(group), len(group))

    def _settings(self, server: Server) -> dict[str, Any]:
        request = self._request
        arguments: dict[str, Any] = {
            "model": str(Path(server.path).expanduser()),
            "dtype": request.dtype,
            "kv_cache_dtype": CACHES[server.cache],
            "kv_cache_memory_bytes": request.cache_bytes(),
            "max_model_len": request.longest,
            "max_num_seqs": max(request.concurrencies),
            "max_num_batched_tokens": _BATCHED_TOKENS,
            "enable_prefix_caching": False,
            "enforce_eager": request.eager,
            "skip_tokenizer_init": True,
        }
        if server.attention != VLLM:
            arguments["attention_backend"] = "KVFOLD"
        if request.random_weights:
            arguments["load_format"] = "dummy"
        made_up = not request.computed
        return {"arguments": arguments, "made_up": made_up, "threads": request.threads}

    def _together(self, group: list[Server]) -> dict[Server, Measured]:
        """Every round, each case is measured of each engine, one right after the other."""
        self._close(group)
        self._open(group)
        found = {server: Measured() for server in group}
        for number in range(self._request.rounds):
            self._round(number, _turned(group, number), found)
        return found

    def _alone(self, group: list[Server]) -> dict[Server, Measured]:
        """Every engine is started again and again, and measured with nothing beside it."""
        found = {server: Measured() for server in group}
        for start in range(self._request.starts or 1):
            for server in _turned(group, start):
                self._close(())
                self._open([server])
                measured = {server: Measured()}
                for number in range(self._request.rounds):
                    self._round(number, [server], measured)
                found[server].add(measured[server])
        self._close(())
        return found

    def _round(self, number: int, order: list[Server], found: dict[Server, Measured]) -> None:
        """A sample of every case."""
        for context in self._request.contexts:
            for server in order:
                seconds, token = self._first(self._engines[server], context, number)
                found[server].first.setdefault(context, []).append(seconds)
                found[server].tokens.setdefault(context, []).append(token)
        for case in self._cases:
            seconds = self._read()
            for server in order:
                decoding = self._decode(self._engines[server], *case, number)
                found[server].decoding.setdefault(case, []).append(decoding)
                found[server].reading.setdefault(case, []).append(seconds)

    def _first(self, engine: Engine, context: int, number: int) -> tuple[float, int]:
        asked = Asked(concurrency=1, context=context, output=1, computed=True, seed=number)
        steps, tokens = engine.ask(asked)
        self._tick()
        return first_token(steps), tokens[0]

    def _decode(self, engine: Engine, context: int, concurrency: int, number: int) -> Decoding:
        request = self._request
        waves = -(-(request.requests or 1) // concurrency)
        steps = []
        for wave in range(waves):
            seed = number * waves + wave
            asked = Asked(concurrency, context, request.output, request.computed, seed)
            steps += engine.ask(asked)[0]
        self._tick()
        return Decoding.of(steps)

    def _read(self) -> float:
        start = perf_counter()
        read(self._data)
        return perf_counter() - start

    def _tick(self) -> None:
        self._done += 1
        self._progress("samples", self._done, self._samples)

    def _rows(
        self, group: list[Server], found: dict[Server, Measured]
    ) -> dict[tuple[Server, tuple[int, int]], Row]:
        return {
            (server, case): self._row(server, case, found)
            for server in group
            for case in self._cases
        }

    def _row(self, server: Server, case: tuple[int, int], found: dict[Server, Measured]) -> Row:
        context, concurrency = case
        measured, own = found[server], DTYPES[self._request.dtype]
        decoding = measured.decoding[case]
        running = max(each.running for each in decoding)
        seconds = Timing.of([each.seconds for each in decoding])
        speed = measured.speed(case)
        layers = decoder_of(server.path).layers
        kv_bytes = kv_bytes_expected(layers, server.cache, context * running)
        must_read = self._request.read_bytes(server.path) + kv_bytes
        bandwidth = Spread.of([self._data.nbytes / each for each in measured.reading[case]])
        peer = found.get(Server(server.path, VLLM, own))
        first = next(
            found[other]
            for other in found
            if other.path == self._request.paths[0]
            and other.implementation == server.implementation
        )
        return Row(
            benchmark="serve",
            case={
                "model": Path(server.path).resolve().name,
                "num_heads": layers[0].num_heads,
                "num_kv_heads": layers[0].num_kv_heads,
                "context": context,
                "batch": concurrency,
                "memory": self._request.cache_bytes(),
            },
            implementation=server.implementation,
            kv_bytes=kv_bytes,
            kv_bytes_expected=kv_bytes,
            bytes=must_read,
            seconds=seconds,
            bandwidth=bandwidth.median,
            floor_fraction=Spread.of(
                [must_read / b / s for b, s in zip(bandwidth.samples, seconds.samples, strict=True)]
            ),
            working_set=must_read,
            cold=is_cold(must_read),
            vs_best_peer=ratio(speed, peer.speed(case)) if peer else None,
            vs_first=ratio(speed, first.speed(case)),
            first_token=measured.until_first(context),
            prefill_vs_peer=(
                ratio(peer.until_first(context), measured.until_first(context)) if peer else None
            ),
            top1=measured.agreeing(peer) if peer else None,
            tokens_per_second=speed,
            running=running,
            cache_tokens=self._about[server]["cache_tokens"],
            slope=measured.slope(tuple(self._request.contexts), concurrency),
            starts=self._request.starts,
        )


def _turned(group: list[Server], number: int) -> list[Server]:
    """The group, begun with another one each time, so that nobody always follows the same."""
    turn = number % len(group)
    return group[turn:] + group[:turn]
