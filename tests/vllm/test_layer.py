"""A layer over an engine's blocks, without the engine: ragged steps, shared blocks, all formats."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfold.errors import InputError
from kvfold.ops.formats import FORMATS
from kvfold.vllm.batch import Group, groups
from kvfold.vllm.layer import Layer, layer_options
from kvfold.vllm.pages import PageFormat
from kvfold.vllm.recent import Rings
from tests.toolbox.attention_cases import (
    check_as_good_as_pytorch,
    noise,
    one_byte_weights,
    skip_without_kernels,
    slopes,
    use_backend,
)
from tests.toolbox.cache_cases import as_stored

HEADS, KV_HEADS, DIM, V_DIM = 6, 2, 20, 13
BLOCK = 32
#: New tokens of four sequences, step by step: prompts and chunks, decoding, drafts, an empty one.
STEPS = [[37, 1, 19, 3], [1, 1, 40, 1], [4, 1, 4, 0], [2, 33, 1, 1]]


BACKENDS = ("cpu", "triton", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(request.param, monkeypatch)
    return str(request.param)


class Engine:
    """Memory as vLLM makes it, full of what was there before, and tables in no order."""

    def __init__(
        self, name: str, packed: bool, sequences: int = 4, width: int = 4, gpu: bool = False
    ) -> None:
        self.gpu = gpu
        self.fmt = FORMATS[name]
        size = PageFormat(self.fmt, DIM, V_DIM, BLOCK, packed).token_bytes
        blocks = sequences * width + 1
        generator = torch.Generator().manual_seed(1)
        bytes_ = torch.randint(256, (blocks, 3, KV_HEADS, BLOCK * size), generator=generator)
        memory = bytes_.to(torch.uint8)[:, 1]  # between other layers'
        self.cache = memory.unflatten(-1, (BLOCK, size))
        order = torch.randperm(blocks - 1, generator=generator).to(torch.int32) + 1
        self.table = order.view(sequences, width)
        self.layer = Layer(self.fmt, KV_HEADS, DIM, V_DIM)
        self.k, self.v = (noise(sequences, 200, KV_HEADS, d, seed=d) for d in (DIM, V_DIM))
        self.lengths = [0] * sequences

    def step(self, new: list[int], **options: Any) -> None:
        """New tokens of each sequence; every output is compared with the definition."""
        begins = [sum(new[:b]) for b in range(len(new) + 1)]
        before, self.lengths = self.lengths, [a + b for a, b in zip(self.lengths, new, strict=True)]
        k, v = (
            torch.cat([x[b, before[b] : self.lengths[b]] for b in range(len(new))])
            for x in (self.k, self.v)
        )
        q = noise(begins[-1], HEADS, DIM, dtype=torch.bfloat16, seed=7).float()
        out = torch.full((begins[-1], HEADS, V_DIM), torch.nan)
        there = torch.tensor(self.lengths, dtype=torch.int32) if self.gpu else None
        upper = [length + 3 for length in self.lengths] if self.gpu else self.lengths
        calls = groups(begins, upper, self.table, there)
        asked = layer_options(DIM**-0.5, **options)
        self.layer.forward(q, k, v, self.cache, calls, asked, out)
        for b, count in enumerate(new):
            if count:
                rows = slice(begins[b], begins[b + 1])
                self._check(b, q[rows], out[rows], options)

    def _check(self, b: int, q: torch.Tensor, out: torch.Tensor, options: dict[str, Any]) -> None:
        length, name = self.lengths[b], self.fmt.name
        k = as_stored(self.k[b, :length].transpose(0, 1), name, True)[None]
        v = as_stored(self.v[b, :length].transpose(0, 1), name, False)[None]
        options = dict(options)
        given = {"window": options.pop("sliding_window", None), **options}
        slack = one_byte_weights(SimpleNamespace(formats=(self.fmt, self.fmt)), v)  # type: ignore[arg-type]
        q, out = q.transpose(0, 1)[None], out.transpose(0, 1)[None]
        check_as_good_as_pytorch(out, q, k, v, torch.bfloat16, slack=slack, **given)


def _quick(often: Collection[str]) -> list[Any]:
    """Backends and formats; Triton's interpreter takes minutes for those that are not often."""
    return [
        pytest.param(b, f, marks=[pytest.mark.slow] if b == "triton" and f not in often else [])
        for b in BACKENDS
        for f in FORMATS
    ]


@pytest.mark.parametrize(("backend", "name"), _quick(set(FORMATS) - {"nl4"}), indirect=["backend"])
def test_ragged_steps_are_the_definition(name: str, backend: str) -> None:
    engine = Engine(name, packed=backend == "cpu")
    for new in STEPS:
        engine.step(new)


# Lengths are read in one way whatever the format, and the interpreter takes its time.
OFTEN = ("bf16", "int8")


@pytest.mark.parametrize(
    "name",
    [x if x in OFTEN else pytest.param(x, marks=pytest.mark.slow) for x in FORMATS],
)
def test_steps_whose_lengths_a_gpu_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Triton's interpreter: prompts go in pieces, and no length comes to the host."""
    pytest.importorskip("triton")
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    engine = Engine(name, packed=False, gpu=True)
    for new in STEPS:
        engine.step(new)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 21},
        {"softcap": 5.0},
        {"alibi_slopes": slopes(HEADS)},
        {"sink_logits": torch.linspace(-1, 2, HEADS)},
    ],
    ids=str,
)
def test_what_layers_of_models_ask_for(options: dict[str, Any], backend: str) -> None:
    engine = Engine("bf16", packed=backend == "cpu")
    for new in STEPS:
        engine.step(new, **options)


def test_sequences_of_one_step_read_blocks_that_another_one_writes(backend: str) -> None:
    engine = Engine("int8", packed=backend == "cpu", sequences=2)
    engine.k[1, :BLOCK], engine.v[1, :BLOCK] = engine.k[0, :BLOCK], engine.v[0, :BLOCK]
    engine.table[1, 0] = engine.table[0, 0]
    engine.lengths = [0, BLOCK]  # its prompt begins as the other's, which comes in this very step
    engine.step([BLOCK + 2, 5])


def test_memory_of_another_layer_is_not_touched() -> None:
    skip_without_kernels()
    engine = Engine("int4", packed=True)
    base = engine.cache._base
    assert base is not None
    others = base.view(engine.cache.shape[0], 3, -1)[:, [0, 2]].clone()
    unused = engine.cache[0].clone()
    for new in STEPS:
        engine.step(new)
    assert torch.equal(base.view(engine.cache.shape[0], 3, -1)[:, [0, 2]], others)
    assert torch.equal(engine.cache[0], unused)


def test_memory_of_other_sizes_is_refused() -> None:
    engine = Engine("bf16", packed=True)
    calls = groups([0, 1], [1], engine.table[:1])
    k, v = noise(1, KV_HEADS, DIM), noise(1, KV_HEADS, V_DIM)
    with pytest.raises(InputError, match="expected uint8"):
        engine.layer.write(k, v, engine.cache[..., :-2].contiguous(), calls)
    with pytest.raises(InputError, match="LBHNC"):
        engine.layer.write(k, v, engine.cache.transpose(1, 2), calls)
    with pytest.raises(InputError, match="KV heads"):
        Layer(engine.fmt, 3, DIM, V_DIM).write(k, v, engine.cache, calls)


@pytest.mark.parametrize(
    ("backend", "name"),
    [each for each in _quick({"int8"}) if each.values[1] in ("int8", "int4")],
    indirect=["backend"],
)
def test_layers_of_one_step_share_a_call_and_not_what_differs(name: str, backend: str) -> None:
    """Other memory, other rows, other options and other strides, each after what was shared."""
    one, two = (Engine(name, packed=backend == "cpu") for _ in range(2))
    two.k, two.v = -one.k, one.v.flip(2)
    begins, new, q = [0, 2, 4, 6, 8], [2] * 4, noise(8, HEADS, DIM)
    wide = torch.zeros(8, HEADS, 2 * DIM)[..., :DIM].copy_(q)
    plain, near = layer_options(DIM**-0.5), layer_options(DIM**-0.5, sliding_window=1)
    rows = [(b, t) for b, count in enumerate(new) for t in range(count)]
    steps = [(one, plain, q), (two, plain, -q), (one, near, q), (two, plain, wide), (one, plain, q)]

    def step() -> list[Group]:
        rings = Rings() if name == "int4" else None
        return groups(begins, new, one.table, rings=rings, page_size=BLOCK)

    def outputs(of: Any) -> list[torch.Tensor]:
        found = []
        for _ in range(2):  # what a layer found out about its memory is used from the second on
            shared = step()
            for engine, options, asked in steps:
                k, v = (torch.stack([x[b, t] for b, t in rows]) for x in (engine.k, engine.v))
                out = torch.empty(8, HEADS, V_DIM)
                calls = shared if of is None else of()
                engine.layer.forward(asked, k, v, engine.cache, calls, options, out)
                found.append(out)
        return found

    shared, alone = outputs(None), outputs(step)
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
    assert not torch.equal(shared[0], shared[1])
    assert not torch.equal(shared[0], shared[2])
    assert torch.equal(shared[0], shared[4])


def test_the_second_layer_of_a_step_asks_c_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_kernels()
    one, two = (Engine("int8", packed=True) for _ in range(2))
    k, v, q = noise(4, KV_HEADS, DIM), noise(4, KV_HEADS, V_DIM), noise(4, HEADS, DIM)
    options, out = layer_options(DIM**-0.5), torch.empty(4, HEADS, V_DIM)
    for length in (1, 2):
        calls = groups(range(5), [length] * 4, one.table)
        one.layer.forward(q, k, v, one.cache, calls, options, out)
        if length == 2:
            monkeypatch.setattr(Layer, "attend", None)
        two.layer.forward(q, k, v, two.cache, calls, options, out)
