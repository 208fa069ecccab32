"""Timing, sizes, the gate, records and comparisons."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.bench.attention import run_attention
from kvfold.bench.buffers import Rotation, Rows, copies, read
from kvfold.bench.cases import (
    DTYPES,
    AttentionCase,
    AttentionRequest,
    dtype_of,
)
from kvfold.bench.compare import change, compare_files
from kvfold.bench.gate import Truth
from kvfold.bench.peers import PEERS, Peer
from kvfold.bench.results import Results, Row, load, save
from kvfold.bench.timing import Spread, Timing, measure, ratio
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.limits import MAX_DIM
from kvfold.numbers import BYTES, CONTEXT, HEAD_DIM, Wholes
from kvfold.ops.formats import FORMATS

TINY = AttentionRequest(
    num_heads=4,
    kv_heads=(2,),
    head_dims=(32,),
    contexts=(48,),
    dtypes=("bf16",),
    against=("matmul",),
    rounds=1,
    working_set=1 << 16,
)


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *seconds: float) -> object:
        def work() -> None:
            turn = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds[min(turn, len(seconds) - 1)]

        return work


def test_competitors_take_turns_and_nobody_keeps_a_neighbour() -> None:
    clock = Clock()
    workers = {name: clock.worker(name, 1.0) for name in "abc"}
    measure(workers, rounds=3, repeats=1, clock=clock)  # type: ignore[arg-type]
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab"


def test_medians_quartiles_and_warm_up() -> None:
    clock = Clock()
    # The first call is slow, and does not count.
    call = clock.worker("a", 100.0, 5.0, 1.0, 2.0, 3.0, 4.0)
    found = measure({"a": call}, rounds=5, repeats=1, clock=clock)  # type: ignore[dict-item]
    assert found["a"] == Timing(3.0, 2.0, 4.0, (5.0, 1.0, 2.0, 3.0, 4.0))


def test_samples_last_long_enough() -> None:
    clock = Clock()
    call = clock.worker("a", 0.001)
    found = measure({"a": call}, rounds=2, min_time=0.05, clock=clock)  # type: ignore[dict-item]
    assert found["a"].median == pytest.approx(0.001)
    # warm-up, calibration, and two samples of at least 50 calls
    assert 150 <= len(clock.calls) < 300


def test_a_clock_that_stands_still_while_calibrating_is_no_trap() -> None:
    clock = Clock()
    call = clock.worker("a", *[0.0] * 20, 0.01)
    found = measure({"a": call}, rounds=1, min_time=0.02, clock=clock)  # type: ignore[dict-item]
    assert found["a"].median > 0


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = Spread.of([2.0, 20.0, 4.0]), Spread.of([1.0, 10.0, 2.0])
    assert ratio(slow, fast).samples == (2.0, 2.0, 2.0)
    assert ratio(slow, fast).relative == 0
    assert ratio(fast, slow, 3).median == 1.5


@given(st.lists(st.floats(0.001, 1000), min_size=1))
def test_quartiles_enclose_the_median(samples: list[float]) -> None:
    found = Spread.of(samples)
    assert min(samples) <= found.low <= found.median <= found.high <= max(samples)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("8k", 8000), ("1.5Ki", 1536), ("1MB", 10**6), ("2GiB", 2 << 30), ("3gi", 3 << 30)],
)
def test_sizes(text: str, value: int) -> None:
    assert BYTES.read(text, "--working-set") == value


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "0.3", "8q", "1e3", "nan", "8k8"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="--context"):
        CONTEXT.read(text, "--context")


def test_lists() -> None:
    assert Wholes(CONTEXT).read("1Ki, 8k,1024", "--context") == (1024, 8000)
    assert DTYPES.read("int8/int4,bf16", "--dtype") == ("int8/int4", "bf16")
    assert DTYPES.read("none", "--dtype") == ()
    assert dtype_of("int8/int4") == ("int8", "int4")
    for text in ("", " , "):
        with pytest.raises(InputError, match="empty"):
            Wholes(CONTEXT).read(text, "--context")


def test_what_is_known_without_torch_is_true() -> None:
    assert HEAD_DIM.most == MAX_DIM


@pytest.mark.parametrize("case", [AttentionCase(6, 2, 32, 33, 2), AttentionCase(4, 4, 16, 5, 1)])
@pytest.mark.parametrize("name", [name for name in PEERS if name != "flex"])
def test_every_peer_is_right(name: str, case: AttentionCase) -> None:
    rows = Rows(case, 1 << 12)
    out = PEERS[name].build()(rows.q, *rows.take())
    assert Truth(rows.q, rows.k, rows.v).judge(out).passed


def test_the_gate_refuses_what_is_wrong() -> None:
    rows = Rows(AttentionCase(4, 2, 32, 64, 1), 1)
    truth = Truth(rows.q, rows.k, rows.v)
    right = PEERS["sdpa"].build()(rows.q, rows.k, rows.v)
    assert truth.judge(right).passed
    swapped = PEERS["sdpa"].build()(rows.q, rows.k.flip(1), rows.v)
    assert not truth.judge(swapped).passed
    assert not truth.judge(right * torch.nan).passed
    assert not truth.judge(right[:, :2]).passed


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "liar", Peer("liar", "", lambda: lambda q, k, v: q))
    monkeypatch.setitem(PEERS, "absent", Peer("absent", "", lambda: 1 / 0))  # type: ignore[arg-type, return-value]
    found = run_attention(replace(TINY, against=("liar", "absent", "sdpa")), min_time=0)
    by_name = {row.implementation: row for row in found.rows}
    assert [row.implementation for row in found.wrong] == ["liar"]
    for name, status in (("liar", "wrong"), ("absent", "skipped")):
        row = by_name[name]
        assert row.status == status
        assert row.reason
        assert row.seconds is row.floor_fraction is row.vs_best_peer is None
    assert by_name["kvfold bf16"].seconds is not None
    best = by_name["sdpa"].vs_best_peer
    assert best is not None
    assert best.median == 1


def test_selecting_caches_take_part() -> None:
    """Held to attention over what they select; they read less, and are weighed as such."""
    asked = replace(TINY, contexts=(1024,), dtypes=("bf16", "int8"), selects=(0.5,))
    found = {row.implementation: row for row in run_attention(asked, min_time=0).rows}
    for dtype in asked.dtypes:
        whole, half = found[f"kvfold {dtype}"], found[f"kvfold {dtype}, 0.5 read"]
        assert half.status == "ok", half.reason
        assert 0.5 < half.kv_bytes / whole.kv_bytes < 0.55
        assert half.error is not None
        assert half.allowed is not None
        assert half.vs_own_bf16 is not None


def test_evicting_caches_take_part() -> None:
    """Held to attention over what they kept of each KV head."""
    asked = replace(TINY, contexts=(1024,), dtypes=("bf16", "int8"), evicts=(0.5,))
    found = {row.implementation: row for row in run_attention(asked, min_time=0).rows}
    for dtype in asked.dtypes:
        whole, half = found[f"kvfold {dtype}"], found[f"kvfold {dtype}, 0.5 kept"]
        assert half.status == "ok", half.reason
        assert half.kv_bytes / whole.kv_bytes == pytest.approx(0.5, rel=0.02)
        assert half.vs_own_bf16 is not None
    with pytest.raises(
        InputError, match=r"--evict 0\.5 of 512 tokens is 256; expected at least 320"
    ):
        replace(TINY, contexts=(512,), evicts=(0.5,))


def test_rotations_share_their_turns() -> None:
    turns = Rotation("abc")
    assert "".join(turns.take() for _ in range(7)) == "abcabca"
    rows = Rows(AttentionCase(1, 1, 8, 4, 1), 5 * 128)
    assert len(rows.flat) == 5
    first, second = rows.take()[0], rows.span(3)
    assert first.data_ptr() == rows.flat[0].data_ptr()
    assert second.data_ptr() == rows.flat[1].data_ptr()
    assert rows.span(2).data_ptr() == rows.flat[0].data_ptr()  # one was left: begin again
    assert copies(1 << 30, 1) == 1
    read(rows.flat)


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("length", [5, 64, 500])
def test_step_bytes_are_what_a_full_cache_takes(dtype: str, length: int) -> None:
    cache = KVCache(2, 64, batch=3, dtype=dtype, max_length=length)
    cache.append(torch.randn(3, 2, length, 64), torch.randn(3, 2, length, 64))
    fmt = FORMATS[dtype]
    row = 2 * (fmt.row_bytes(64) + 2 * fmt.groups(64)) * 2
    if not fmt.keeps_exact_ends:
        assert cache.bytes_per_step == 3 * length * row
    elif length == 500:  # between all in INT4, and 16 + 64 + 32 tokens in bfloat16
        half = 2 * 64 * 2 * 2
        assert 3 * (420 * row + 80 * half) <= cache.bytes_per_step <= 3 * (388 * row + 112 * half)
    else:
        assert cache.bytes_per_step == 3 * length * 2 * 64 * 2 * 2
    assert cache.bytes_per_step <= cache.nbytes


def result(fraction: list[float], name: str = "sdpa", **changes: object) -> Row:
    case = {"num_heads": 8, "num_kv_heads": 2, "context": 64, "batch": 1}
    return Row("attention", case, name, floor_fraction=Spread.of(fraction), **changes)  # type: ignore[arg-type]


def test_changes_beyond_the_spread_are_flagged() -> None:
    old = result([0.4, 0.5, 0.6])
    assert change(old, result([0.5, 0.52, 0.6])).verdict == "same"
    assert change(old, result([0.8, 0.9, 0.8])).verdict == "faster"
    slower = change(old, result([0.2, 0.25, 0.3]))
    assert slower.verdict == "slower"
    assert slower.ratio == pytest.approx(0.5)
    wrong = replace(old, floor_fraction=None, status="wrong")
    assert change(old, wrong).verdict == "wrong"
    assert change(old, wrong).ratio is None


def test_files_are_read_back_and_the_latest_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, again, other = result([0.1]), result([0.2]), result([0.3], "matmul")
    save(Results("kvfold bench", {"cpu": "x"}, (first, other)), path)
    save(Results("kvfold bench", {"cpu": "x"}, (again,)), path)
    assert {row.implementation: row for row in load(path)} == {"sdpa": again, "matmul": other}
    save(Results("", {}, (result([0.4]),)), tmp_path / "b.jsonl")
    found = compare_files(path, tmp_path / "b.jsonl")
    assert [c.ratio for c in found.changes] == [pytest.approx(2)]
    assert found.notes == (f"1 of 2 rows are only in {path}",)
    assert json.loads(path.read_text().splitlines()[0])["machine"] == {"cpu": "x"}
