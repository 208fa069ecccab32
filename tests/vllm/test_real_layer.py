"""One layer of vLLM's, with its memory and its metadata: the definition, and its own backend.

The cases are those that vLLM tests its CPU backend with, at lengths a laptop has time for.
"""

from itertools import accumulate
from typing import Any

import pytest
import torch

from kvfold.ops.formats import FORMATS
from kvfold.vllm.pages import format_named
from tests.toolbox.attention_cases import DTYPES, distance, naive, slopes
from tests.toolbox.cache_cases import as_stored
from tests.toolbox.vllm_cases import HEAD_SIZES, OURS, OWN, VllmLayer, needs_vllm

pytestmark = [pytest.mark.real, needs_vllm]

#: New tokens and length of each sequence: decoding, prompts and chunks of them, both.
BATCHES = {
    "decode": [(1, 213), (1, 1), (1, 312), (1, 7), (1, 912)],
    "prefill": [(145, 145), (5, 5), (3, 16), (134, 431)],
    "mixed": [(92, 256), (1, 234), (98, 145), (1, 462), (145, 145)],
}
every_batch = pytest.mark.parametrize("batch", BATCHES)
SHORT = [(1, 40), (1, 1), (3, 16), (17, 33)]  # as long as an interpreter has time for


@pytest.fixture(autouse=True)
def _blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read what blocks store, also where recent tokens of four bits are kept exactly."""
    monkeypatch.setattr("kvfold.vllm.backend.Rings", lambda: None)


class Case:
    """Keys and values of a batch's sequences, and the tables they lie by."""

    def __init__(self, batch: str, heads: tuple[int, int], head_size: int, dtype: Any, size: int):
        self.new, self.lengths = zip(*BATCHES.get(batch, SHORT), strict=True)
        generator = torch.Generator().manual_seed(head_size)

        def noise(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, head_size, generator=generator).to(dtype)

        self.k, self.v = ([noise(n, heads[1]) for n in self.lengths] for _ in range(2))
        self.q = noise(sum(self.new), heads[0])
        blocks = [-(-n // size) for n in self.lengths]
        self.num_blocks = sum(blocks) + 1
        order = torch.randperm(self.num_blocks - 1, generator=generator).to(torch.int32) + 1
        ends = list(accumulate(blocks))
        self.table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for row, end, count in zip(self.table, ends, blocks, strict=True):
            row[:count] = order[end - count : end]

    def run(self, layer: VllmLayer) -> torch.Tensor:
        """The batch's step, after another one that brings all that came before."""
        before = [n - new for n, new in zip(self.lengths, self.new, strict=True)]
        there = [b for b, n in enumerate(before) if n]
        if there:
            k, v = (torch.cat([x[b][: before[b]] for b in there]) for x in (self.k, self.v))
            q = torch.zeros(len(k), *self.q.shape[1:], dtype=k.dtype)
            counts = [before[b] for b in there]
            layer.step(counts, counts, self.table[there], (q, k, v))
        k, v = (
            torch.cat([x[begin:] for x, begin in zip(y, before, strict=True)])
            for y in (self.k, self.v)
        )
        return layer.step(self.new, self.lengths, self.table, (self.q, k, v))

    def defined(self, precision: torch.dtype, name: str | None, **options: Any) -> torch.Tensor:
        """By the definition, over keys and values as the format stores them."""
        outs, begin = [], 0
        for k, v, new in zip(self.k, self.v, self.new, strict=True):
            q = self.q[begin : begin + new].transpose(0, 1)[None]
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            if name:
                k, v = as_stored(k.float(), name, True), as_stored(v.float(), name, False)
            outs.append(naive(q, k[None], v[None], precision, **options)[0][0].transpose(0, 1))
            begin += new
        return torch.cat(outs)


def check(
    batch: str,
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 128,
    cache_dtype: str = "auto",
    slack: float = 0.0,
    own: bool = True,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """As good as PyTorch in that precision, and vLLM's own backend within its tests' tolerance."""
    case = Case(batch, heads, head_size, dtype, block_size)
    made = {
        backend: VllmLayer(
            backend, heads, head_size, dtype, block_size, cache_dtype, case.num_blocks, given or {}
        )
        for backend in ((OURS, OWN) if own else (OURS,))
    }
    found = {backend: case.run(layer) for backend, layer in made.items()}
    fmt = format_named(cache_dtype, dtype)
    name = None if fmt.plain else fmt.name
    truth = case.defined(torch.float64, name, **options)
    allowed = 2 * distance(case.defined(dtype, name, **options), truth) + 1e-5 + slack
    error = distance(found[OURS], truth)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    if own:
        torch.testing.assert_close(found[OURS], found[OWN], atol=1.5e-2, rtol=1e-2)


@every_batch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(head_size: int, dtype: torch.dtype, batch: str) -> None:
    check(batch, (9, 3), head_size, dtype)


@every_batch
@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize("block_size", [32, 96, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)], ids=str)
def test_heads_blocks_and_windows(
    heads: tuple[int, int], block_size: int, window: int | None, batch: str
) -> None:
    given = {"per_layer_sliding_window": window}
    check(batch, heads, 96, block_size=block_size, given=given, window=window)


@every_batch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(dtype: torch.dtype, batch: str) -> None:
    check(batch, (9, 3), 96, dtype, given={"logits_soft_cap": 50.0}, softcap=50.0)


@every_batch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alibi(dtype: torch.dtype, batch: str) -> None:
    biases = slopes(9)
    check(batch, (9, 3), 96, dtype, given={"alibi_slopes": biases.tolist()}, alibi_slopes=biases)


@every_batch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks(dtype: torch.dtype, batch: str) -> None:
    sinks = torch.linspace(0, 9, 9).to(torch.bfloat16)
    check(batch, (9, 3), 96, dtype, given={"sinks": sinks}, sink_logits=sinks)


@every_batch
@pytest.mark.parametrize(
    "cache_dtype",
    [
        "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_per_token_head", "int8_per_token_head",
        "int4_per_token_head",
    ],
)  # fmt: skip
def test_formats(cache_dtype: str, batch: str) -> None:
    name = format_named(cache_dtype, torch.bfloat16).name
    assert name in FORMATS
    check(batch, (9, 3), 64, cache_dtype=cache_dtype, own=False)


@pytest.mark.parametrize(
    "cache_dtype", ["auto", "fp8", "int8_per_token_head", "int4_per_token_head"]
)
def test_kernels_of_gpus(cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, interpreted where there is none: a row per token in vLLM's blocks."""
    pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    check("short", (8, 2), 64, block_size=32, cache_dtype=cache_dtype, own=False)
