"""The attention layer: equal to what it generalises, whichever way it is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from kvfold.errors import InputError
from kvfold.geometry import AttentionGeometry
from kvfold.nn import GroupedQueryAttention, Rotary
from tests.toolbox.nn_cases import F32, F64, close, layer, repeated, tokens

# What it generalises


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, r) for r in (1, 2, 3, 6)] + [(5, 1), (14, 2)])
def test_equals_repeat_kv_attention(heads: int, kv_heads: int) -> None:
    gqa = layer(20, heads, kv_heads, head_dim=6, v_head_dim=5, rotary=Rotary(4))
    mha, x = repeated(gqa), tokens(2, 11, 20)
    assert (gqa.geometry.group_size, mha.geometry.group_size) == (heads // kv_heads, 1)
    close(gqa(x), mha(x), 6 * heads)


def torch_attention(ours: Any) -> nn.MultiheadAttention:
    """PyTorch's layer with the same weights."""
    g, width = ours.geometry, ours.kv_hidden_size
    theirs = nn.MultiheadAttention(
        g.hidden_size, g.num_heads, batch_first=True, kdim=width, vdim=width, dtype=F64
    ).eval()
    q, k, v = (getattr(ours, f"{n}_proj") for n in "qkv")
    with torch.no_grad():
        for name, side in (("q", q), ("k", k), ("v", v)):
            if width != g.hidden_size:
                getattr(theirs, f"{name}_proj_weight").copy_(side.weight)
        if width == g.hidden_size:
            theirs.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([q.bias, k.bias, v.bias]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        theirs.out_proj.bias.copy_(ours.o_proj.bias)
    return theirs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_equals_torch_multihead_attention(causal: bool, need_weights: bool) -> None:
    ours = layer(24, 4, 4, causal=causal, qkv_bias=True, out_bias=True)
    x, hidden = tokens(3, 9, 24), torch.ones(9, 9, dtype=torch.bool).triu(1)
    mask = hidden if causal else None
    out, weights = torch_attention(ours)(x, x, x, attn_mask=mask, average_attn_weights=False)
    found = ours(x, need_weights=need_weights)
    close(found[0] if need_weights else found, out, 24)
    if need_weights:
        close(found[1], weights, 24)


@pytest.mark.parametrize("width", [24, 10])
def test_cross_attention_equals_torch(width: int) -> None:
    ours = layer(24, 4, 4, kv_hidden_size=width, causal=False, qkv_bias=True, out_bias=True)
    x, context = tokens(3, 5, 24), tokens(3, 8, width, seed=2)
    lengths = torch.tensor([8, 3, 1])
    padding = torch.arange(8) >= lengths[:, None]
    out, weights = torch_attention(ours)(
        x, context, context, key_padding_mask=padding, average_attn_weights=False
    )
    for hide in ({"lengths": lengths}, {"mask": ~padding[:, None, None]}):
        found = ours(x, context, need_weights=True, **hide)
        close(found[0], out, 24)
        close(found[1], weights, 24)


def llama() -> tuple[Any, LlamaAttention, Callable[..., torch.Tensor]]:
    """A layer, transformers' with the same weights, and a call of the latter in float64."""
    config = LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa"
    )
    ours = layer(48, 6, 2, rotary=Rotary(8))
    theirs = LlamaAttention(config, layer_idx=0).double().eval()
    theirs.load_state_dict(ours.state_dict())

    def call(x: torch.Tensor, first: int = 0, cache: DynamicCache | None = None) -> torch.Tensor:
        frequency = 10000.0 ** -(torch.arange(4, dtype=F64) / 4)
        angles = torch.arange(first, first + x.shape[1], dtype=F64)[:, None] * frequency
        both = torch.cat([angles, angles], -1)[None]
        seen = torch.ones(x.shape[1], first + x.shape[1], dtype=torch.bool).tril(first)
        return theirs(x, (both.cos(), both.sin()), seen[None, None], past_key_values=cache)[0]

    return ours, theirs, call


def test_equals_transformers_llama() -> None:
    ours, theirs, call = llama()
    x = tokens(2, 13, 48)
    close(ours(x), call(x), 48)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@torch.inference_mode()
def test_equals_transformers_llama_with_caches() -> None:
    ours, _, call = llama()
    ours.float()
    x, cache, theirs = tokens(2, 40, 48), ours.new_cache(2, dtype="fp32"), DynamicCache()
    for low, high in ((0, 13), (13, 14), (14, 15), (15, 19), (19, 40)):
        out = ours(x[:, low:high].float(), cache=cache)
        close(out, call(x[:, low:high], low, theirs), 48, F32)


# Positions, masks, weights


def test_half_split_is_interleaved_with_permuted_rows() -> None:
    pairs = layer(24, 4, 2, head_dim=8, rotary=Rotary(6, interleaved=True), qk_norm=1e-6)
    halves = layer(24, 4, 2, head_dim=8, rotary=Rotary(6), qk_norm=1e-6)
    order = torch.tensor([0, 2, 4, 1, 3, 5, 6, 7])
    state = pairs.state_dict()
    for name in ("q_proj.weight", "k_proj.weight"):
        state[name] = state[name].unflatten(0, (-1, 8))[:, order].flatten(0, 1)
    for name in ("q_norm.weight", "k_norm.weight"):
        state[name] = state[name][order]
    halves.load_state_dict(state)
    x = tokens(2, 9, 24)
    close(halves(x), pairs(x), 24)


def test_positions_may_be_given() -> None:
    turning, x = layer(24, 4, 2, rotary=Rotary(6)), tokens(2, 5, 24)
    at = torch.tensor([[3, 4, 5, 6, 7], [90, 91, 92, 93, 94]])
    close(turning(x, positions=at), turning(x), 24 * 94)  # only distances matter
    apart = turning(x, positions=torch.arange(5) * 3)
    assert not torch.allclose(apart, turning(x), rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"window": 3, "sinks": 1}, {"softcap": 2.0}])
@pytest.mark.parametrize("hiding", ["nothing", "padding", "mask", "bias"])
def test_weights_sum_to_one_and_reproduce_the_output(options: Any, hiding: str) -> None:
    exact = layer(24, 4, 2, v_head_dim=5, rotary=Rotary(6), scale=0.7, **options)
    x = tokens(2, 9, 24)
    hide = {
        "nothing": {},
        "padding": {"start": torch.tensor([0, 2])},
        "mask": {"mask": (tokens(1, 4, 9, 9) > 0) | torch.eye(9, dtype=torch.bool)},
        "bias": {"mask": tokens(2, 1, 1, 9)},
    }[hiding]
    out, weights = exact(x, need_weights=True, **hide)
    blind = weights.sum(-1) == 0
    assert torch.equal(blind.any(1), torch.arange(9) < hide.get("start", torch.zeros(2))[:, None])
    close(weights.sum(-1)[~blind], torch.ones((~blind).sum()).double(), 9)
    v = exact.v_proj(x).unflatten(-1, (2, 5)).transpose(1, 2).repeat_interleave(2, 1)
    close(exact.o_proj((weights @ v).transpose(1, 2).flatten(2)), out, 24)
    close(exact(x, **hide), out, 1)
    assert weights.dtype == F64


def test_low_precision_weights_are_float32() -> None:
    half = layer(24, 4, 2, dtype=torch.bfloat16, rotary=Rotary(6))
    out, weights = half(tokens(2, 9, 24, dtype=torch.bfloat16), need_weights=True)
    assert (out.dtype, weights.dtype) == (torch.bfloat16, F32)
    close(weights.sum(-1), torch.ones(2, 4, 9), 9, F32)


def test_right_padding_without_a_cache() -> None:
    x, lengths = tokens(2, 9, 24), torch.tensor([9, 4])
    for causal in (True, False):
        exact = layer(24, 4, 2, causal=causal)
        out = exact(x, lengths=lengths)
        close(out[1, :4], exact(x[1:, :4])[0], 24)
        close(out[0], exact(x[:1])[0], 24)


# Sizes


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"out_bias": True, "qk_norm": 1e-6}])
@pytest.mark.parametrize("width", [None, 10])
def test_geometry_counts_the_parameters(options: dict[str, Any], width: int | None) -> None:
    made = GroupedQueryAttention(
        24, 6, 2, head_dim=5, v_head_dim=7, kv_hidden_size=width, device="meta", **options
    )
    flags = {name: bool(value) for name, value in options.items()}
    counted = made.geometry.attention_parameters(kv_hidden_size=width, **flags)
    assert counted == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_geometry_counts_the_flops(kv_heads: int) -> None:
    # With a softcap attention is matrix products, which FlopCounterMode can see on every device.
    made = layer(24, 6, kv_heads, head_dim=5, v_head_dim=7, softcap=9.0)
    with FlopCounterMode(display=False) as counter:
        made(tokens(1, 11, 24))
    assert counter.get_total_flops() == made.geometry.forward_flops(11)
    cross = layer(
        24, 6, kv_heads, head_dim=5, v_head_dim=7, softcap=9.0, causal=False, kv_hidden_size=10
    )
    with FlopCounterMode(display=False) as counter:
        cross(tokens(1, 11, 24), tokens(1, 4, 10))
    g = cross.geometry
    projections = g.projection_flops(11, kv_tokens=4, kv_hidden_size=10)
    assert counter.get_total_flops() == projections + g.attention_flops(11, 4)


def test_the_layer_knows_its_geometry() -> None:
    made = GroupedQueryAttention(hidden_size=768, num_heads=12, num_kv_heads=4)
    assert made.geometry == AttentionGeometry(1, 12, 4, 64, 64, 768)
    assert "GQA, 12 heads of 64, 4 KV heads" in repr(made)
    cache = made.new_cache(2, dtype=("int8", "int4"), kind="paged", page_size=16)
    assert [f.name for f in cache.formats] == ["int8", "int4"]
    assert (cache.batch, cache.kind, cache.num_kv_heads) == (2, "paged", 4)


# Odd shapes, other ways to call it


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (1, 1)])
def test_nothing_in_nothing_out(batch: int, length: int) -> None:
    single = layer(24, 4, 2, dtype=F32, rotary=Rotary(6))
    x = tokens(batch, length, 24, dtype=F32)
    out, weights = single(x, need_weights=True)
    assert (out.shape, weights.shape) == (x.shape, (batch, 4, length, length))
    with torch.inference_mode():
        assert single(x, cache=single.new_cache(batch)).shape == x.shape


def test_autocast() -> None:
    single, x = layer(32, 4, 2, dtype=F32, rotary=Rotary(8), qk_norm=1e-6), tokens(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = single(x.float())
    assert out.dtype == torch.bfloat16
    close(out, single(x.float()), 32, torch.bfloat16)


def compiled_equals_eager(backend: str) -> None:
    single = layer(32, 4, 2, dtype=F32, rotary=Rotary(8), qk_norm=1e-6)
    x = tokens(2, 9, 32, dtype=F32)
    compiled: Any = torch.compile(single, fullgraph=True, backend=backend)
    close(compiled(x), single(x), 32, F32)
    torch.autograd.backward(compiled(x).sum())
    assert single.k_proj.weight.grad is not None


def test_compiles_into_one_graph() -> None:
    compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_compiles_to_machine_code() -> None:
    compiled_equals_eager("inductor")


# Bad input


def test_a_window_to_both_sides_of_a_token() -> None:
    """What is further away changes nothing; only a window of past tokens can slide."""
    layer = GroupedQueryAttention(32, 4, 2, causal=False, window=(3, 2))
    x = torch.randn(1, 12, 32)
    before, changed = torch.as_tensor(layer(x)), x.clone()
    changed[:, 6] += 1
    moved = (torch.as_tensor(layer(changed)) != before).any(-1)[0].tolist()
    assert moved == [4 <= t <= 9 for t in range(12)]
    with pytest.raises(InputError, match="kind='sliding' with window=None"):
        layer.new_cache(kind="sliding")
    pair, number = (
        GroupedQueryAttention(32, 4, 2, window=window).new_cache(kind="sliding")
        for window in ((3, 0), 4)
    )
    assert pair.window == number.window == 4
