"""One decode step of attention: kvfold's caches and PyTorch's ways to do the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvfold.bench.buffers import Rotation, Rows, copies, reader, threads
from kvfold.bench.cases import EVICT, SELECT, AttentionCase, AttentionRequest, Part, dtype_of
from kvfold.bench.gate import Truth, Verdict
from kvfold.bench.peers import PEERS, Peer
from kvfold.bench.results import OK, SKIPPED, WRONG, Results, Row
from kvfold.bench.this_machine import described, is_cold
from kvfold.bench.timing import DEFAULT_MIN_TIME, Timing, measure, ratio
from kvfold.cache.kv import KVCache
from kvfold.errors import KVFoldError
from kvfold.ops.select import Select
from kvfold.progress import Progress, no_progress
from kvfold.record import command_line

_READ = "read"
_OWN = "kvfold "


@dataclass(frozen=True)
class Competitor:
    """Who takes part in a case.

    Attributes:
        step: one decode step over the next buffer; None if it cannot be had.
        bytes: of keys and values that a step must read.
    """

    name: str
    step: Callable[[], torch.Tensor] | None
    bytes: int
    verdict: Verdict | None = None
    reason: str = ""
    working_set: int = 0

    @property
    def status(self) -> str:
        if self.verdict is None:
            return SKIPPED
        return OK if self.verdict.passed else WRONG


def run_attention(
    request: AttentionRequest,
    *,
    min_time: float = DEFAULT_MIN_TIME,
    progress: Progress = no_progress,
) -> Results:
    """Measure every case of a request.

    Args:
        min_time: seconds per sample, at least.

    >>> run_attention(AttentionRequest(contexts=[512], kv_heads=[1]))  # doctest: +SKIP
    """
    cases, rows = list(request.cases()), list[Row]()
    with threads(request.threads) as count, torch.no_grad():
        for index, case in enumerate(cases):
            progress("cases", index, len(cases))
            rows += _run_case(case, request, min_time)
        progress("cases", len(cases), len(cases))
        return Results(command_line(request, brief=True), described(count), tuple(rows))


def _run_case(case: AttentionCase, request: AttentionRequest, min_time: float) -> list[Row]:
    rows = Rows(case, request.working_set)
    plain = Truth(rows.q, rows.k, rows.v) if request.against else None
    competitors = [
        _own(case, dtype, part, rows, request.working_set)
        for dtype in request.dtypes
        for part in request.parts
    ]
    if plain is not None:
        competitors += [_against(PEERS[name], rows, plain) for name in request.against]
    steps: dict[str, Callable[[], object]] = {
        c.name: c.step for c in competitors if c.step is not None and c.status == OK
    }
    read, read_bytes = reader(rows)
    timings = measure({_READ: read} | steps, rounds=request.rounds, min_time=min_time)
    return _rows(case, competitors, timings, read_bytes)


def _own(case: AttentionCase, dtype: str, part: Part, rows: Rows, working_set: int) -> Competitor:
    """kvfold's cache of a dtype, filled with the same keys and values as the peers' tensors."""
    first = _filled(case, dtype, part, rows)
    # The truth is what the cache holds: quantization is not the kernel's error. Nor is it an error
    # not to read what was not selected, or is gone.
    held = zip(*(first.read(b) for b in range(case.batch)), strict=True)
    k, v = (torch.stack(side) for side in held)
    seen = _forget(first, part, rows)
    if part.kind == SELECT:
        seen = first.selected(rows.q)
    size = round(first.bytes_per_step)
    caches = [first]
    for _ in range(copies(first.nbytes, working_set) - 1):
        caches.append(_filled(case, dtype, part, rows))
        _forget(caches[-1], part, rows)
    turns = Rotation(caches)

    def step() -> torch.Tensor:
        cache: Any = turns.take()
        out: torch.Tensor = cache.attend(rows.q)  # a pair only if the log-sum-exp is asked for
        return out

    verdict = Truth(rows.q, k, v, seen).judge(step())
    name = _OWN + dtype + part.words
    return Competitor(name, step, size, verdict, verdict.reason, size * len(caches))


def _filled(case: AttentionCase, dtype: str, part: Part, rows: Rows) -> KVCache:
    options: dict[str, Any] = {"kind": "paged"} if part.kind else {"max_length": case.context}
    if part.kind == SELECT:
        options |= {"select": Select(budget=part.share, dense_below=0)}
    cache = KVCache(
        case.num_kv_heads, case.head_dim, batch=case.batch, dtype=dtype_of(dtype), **options
    )
    cache.append(rows.k, rows.v)
    return cache


def _forget(cache: KVCache, part: Part, rows: Rows) -> torch.Tensor | None:
    """Evict by the attention of the queries of the step; which positions were kept."""
    if part.kind != EVICT:
        return None
    return cache.evict(part.share, by=cache.scores(rows.q))


def _against(peer: Peer, rows: Rows, truth: Truth) -> Competitor:
    """A peer; skipped, with the reason, if it cannot be had here."""
    size = rows.flat[0].nbytes
    try:
        attend = peer.build()
        k, v = rows.take()
        verdict = truth.judge(attend(rows.q, k, v))
    except (KVFoldError, KeyboardInterrupt):
        raise
    except Exception as error:  # compilers fail in many ways, and the others can still be timed
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return Competitor(peer.name, None, size, None, f"{type(error).__name__}: {reason}")

    def step() -> torch.Tensor:
        return attend(rows.q, *rows.take())

    return Competitor(peer.name, step, size, verdict, verdict.reason, rows.nbytes)


def _rows(
    case: AttentionCase,
    competitors: list[Competitor],
    timings: dict[str, Timing],
    read_bytes: int,
) -> list[Row]:
    peers = [c.name for c in competitors if c.name in timings and not c.name.startswith(_OWN)]
    best = timings[min(peers, key=lambda name: timings[name].median)] if peers else None
    half = timings.get(_OWN + "bf16")
    return [_result(case, c, timings, read_bytes, best, half) for c in competitors]


def _result(
    case: AttentionCase,
    competitor: Competitor,
    timings: dict[str, Timing],
    read_bytes: int,
    best: Timing | None,
    half: Timing | None,
) -> Row:
    verdict, read = competitor.verdict, timings[_READ]
    values: dict[str, Any] = {
        "benchmark": "attention",
        "case": case.as_dict(),
        "implementation": competitor.name,
        "status": competitor.status,
        "reason": competitor.reason if competitor.status != OK else "",
        "error": verdict.error if verdict else None,
        "allowed": verdict.allowed if verdict else None,
        "kv_bytes": competitor.bytes,
        "bytes": competitor.bytes,
        "bandwidth": read_bytes / read.median,
        "working_set": competitor.working_set,
        "cold": is_cold(competitor.working_set),
    }
    own = timings.get(competitor.name)
    if own is not None:
        values |= {
            "seconds": own,
            "floor_fraction": ratio(read, own, competitor.bytes / read_bytes),
            "vs_best_peer": ratio(best, own) if best else None,
        }
        if half is not None and competitor.name.startswith(_OWN):
            values["vs_own_bf16"] = ratio(half, own)
    return Row(**values)
