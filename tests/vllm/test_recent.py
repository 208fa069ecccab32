"""The last tokens of coarse formats are read exactly, whoever owns the blocks around them."""

import pytest
import torch

from kvfold.kernels import pages
from kvfold.ops.formats import FORMATS
from kvfold.vllm.batch import Group, groups
from kvfold.vllm.layer import Layer, layer_options
from kvfold.vllm.pages import PageFormat
from kvfold.vllm.recent import RECENT, Rings
from tests.toolbox.attention_cases import (
    check_as_good_as_pytorch,
    noise,
    skip_without_kernels,
)
from tests.toolbox.cache_cases import as_stored

KV_HEADS, DIM, BLOCK, MOST = 2, 32, 32, 400
WIDTH = MOST // BLOCK + 1


class Engine:
    """Sequences of an engine that keep their latest tokens exactly."""

    def __init__(self, sequences: int, packed: bool = True) -> None:
        size = PageFormat(FORMATS["int4"], DIM, DIM, BLOCK, packed).token_bytes
        blocks = sequences * WIDTH
        self.cache = torch.zeros(blocks, KV_HEADS, BLOCK, size, dtype=torch.uint8)
        self.table = torch.randperm(blocks).to(torch.int32).view(sequences, WIDTH)
        self.layer, self.rings = Layer(FORMATS["int4"], KV_HEADS, DIM, DIM), Rings()
        self.k, self.v = (noise(sequences, MOST, KV_HEADS, DIM, seed=i) for i in range(2))
        self.lengths = [0] * sequences

    def step(self, new: list[int], rows: list[int] | None = None) -> list[Group]:
        """New tokens of some sequences, written. Those that are not in it miss the step."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        begins = [sum(new[:b]) for b in range(len(new) + 1)]
        before = [self.lengths[b] for b in rows]
        for b, count in zip(rows, new, strict=True):
            self.lengths[b] += count
        lengths = [self.lengths[b] for b in rows]
        table = self.table[rows]
        found = groups(begins, lengths, table, rings=self.rings, page_size=BLOCK)
        k, v = (
            torch.cat([x[b, old:end] for b, old, end in zip(rows, before, lengths, strict=True)])
            for x in (self.k, self.v)
        )
        self.layer.write(k, v, self.cache, found)
        self.new = k, v
        return found

    def reads(self, group: Group, index: int = 0) -> tuple[torch.Tensor, int]:
        """The keys ``[S, Hkv, D]`` that attention reads, and where exact ones begin."""
        views = self.layer._views(group, self.cache, self.new)
        ends = [pages.listed(view.end, len(view.table))[index] for view in views]
        parts = []
        for view, end in zip(views, ends, strict=True):
            begin = pages.listed(view.begin, len(view.table))[index]
            parts.append(pages.read(view, index, begin, end)[0])
        return torch.cat(parts, 1).transpose(0, 1), ends[0] if len(views) > 1 else 0

    def check(self, group: Group, b: int, exact: int, index: int = 0) -> None:
        """Sequence b reads as stored in INT4 up to ``exact``, and in bfloat16 from there on."""
        found, begin = self.reads(group, index)
        assert begin == exact
        k = self.k[b, : self.lengths[b]]
        coarse = as_stored(k.transpose(0, 1), "int4", True).transpose(0, 1)
        torch.testing.assert_close(found[:exact], coarse[:exact], atol=2**-20, rtol=0)
        assert torch.equal(found[exact:], k[exact:].bfloat16().float())


@pytest.fixture(autouse=True)
def _kernels() -> None:
    skip_without_kernels()


def test_prompts_and_steps_read_their_last_tokens_exactly() -> None:
    engine = Engine(2)
    (group,) = engine.step([20, 0])
    engine.check(group, 0, exact=0)
    for _ in range(60):
        (group,) = engine.step([1, 0])
    engine.check(group, 0, exact=80 - RECENT)
    both = engine.step([1, 100])
    engine.check(both[0], 0, exact=81 - RECENT)
    found, _ = engine.reads(both[1])
    assert torch.equal(found, engine.k[1, :100])  # a prompt reads its own tensors
    for step in range(1, 140):
        (group,) = engine.step([1, 1])
        for b, length in enumerate((81, 100)):
            engine.check(group, b, exact=length + step - RECENT, index=b)


def test_a_prompt_in_pieces() -> None:
    engine = Engine(1)
    for piece, exact in ((90, 0), (70, 160 - RECENT), (17, 177 - RECENT), (1, 178 - RECENT)):
        (group,) = engine.step([piece])
        if exact:
            engine.check(group, 0, exact=exact)


def test_drafts_that_are_dropped_leave_nothing_behind() -> None:
    engine = Engine(1)
    engine.step([70])
    for step in range(40):
        (group,) = engine.step([6])
        engine.check(group, 0, exact=max(6, engine.lengths[0] - RECENT))
        dropped = step % 6
        engine.lengths[0] -= dropped
        again = engine.k[:, engine.lengths[0] : engine.lengths[0] + 6]
        again.copy_(noise(*again.shape, seed=100 + step))


def test_who_missed_a_step_begins_anew() -> None:
    engine = Engine(2)
    engine.step([30, 30])
    engine.step([1], rows=[1])
    group = engine.step([1, 1])[0]
    engine.check(group, 0, exact=30, index=0)
    engine.check(group, 1, exact=0, index=1)


def test_a_block_that_is_given_to_another_takes_no_ring_along() -> None:
    engine = Engine(2)
    engine.step([40], rows=[0])
    engine.table[1, :2] = engine.table[0, :2].flip(0)  # the first is gone, its blocks are reused
    engine.step([33], rows=[1])
    (group,) = engine.step([1], rows=[1])
    engine.check(group, 1, exact=0)


def test_sequences_that_share_blocks_part() -> None:
    engine = Engine(2)
    engine.step([BLOCK], rows=[0])
    engine.k[1, :BLOCK], engine.v[1, :BLOCK] = engine.k[0, :BLOCK], engine.v[0, :BLOCK]
    engine.table[1, 0] = engine.table[0, 0]
    engine.lengths[1] = BLOCK  # found in the prefix cache
    (group,) = engine.step([1, 1], rows=[1, 0])
    engine.check(group, 1, exact=0, index=0)  # the ring is that of whoever comes first
    engine.check(group, 0, exact=BLOCK, index=1)
    (group,) = engine.step([1, 1], rows=[0, 1])
    engine.check(group, 0, exact=BLOCK, index=0)
    engine.check(group, 1, exact=0, index=1)


def test_rings_are_used_again() -> None:
    engine = Engine(3)
    for turn in range(6):
        engine.lengths = [0, 0, 0]
        engine.step([20, 20], rows=[turn % 3, (turn + 1) % 3])
    assert engine.rings.count <= 4  # those of one step and of the step before


@pytest.mark.parametrize(
    ("backend", "tokens"),
    [
        *((backend, tokens) for backend in ("cpu", "torch") for tokens in (3, 20)),
        ("triton", 3),
        pytest.param("triton", 20, marks=pytest.mark.slow),
    ],
)
def test_attention_over_blocks_and_rings(
    backend: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", backend)
    engine = Engine(2, packed=backend == "cpu")
    engine.step([70, 90])
    calls = engine.step([tokens, tokens])
    q = noise(2 * tokens, 4, DIM, dtype=torch.bfloat16).float()
    out = torch.empty(2 * tokens, 4, DIM)
    engine.layer.attend(q, engine.cache, calls, layer_options(DIM**-0.5), out, engine.new)
    for b in range(2):
        group, row = (calls[0], b) if len(calls) == 1 else (calls[b], 0)
        views = engine.layer._views(group, engine.cache, engine.new)
        parts = []
        for view in views:
            begin, end = (pages.listed(x, len(view.table))[row] for x in (view.begin, view.end))
            parts.append(pages.read(view, row, begin, end))
        k, v = (torch.cat(side, 1)[None] for side in zip(*parts, strict=True))
        rows = slice(tokens * b, tokens * (b + 1))
        given = q[rows].transpose(0, 1)[None], k, v
        check_as_good_as_pytorch(
            out[rows].transpose(0, 1)[None], *given, torch.bfloat16,
            slack=16 / 510 * float(v.abs().mean()),
        )  # fmt: skip
