"""Multi-head latent attention (MLA) as a layer."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from kvfold.cache.checks import check_rotary, check_sizes, check_switches
from kvfold.cache.latent import Dtype, LatentCache
from kvfold.errors import InputError
from kvfold.geometry import AttentionGeometry
from kvfold.kernels.dispatch import attention
from kvfold.kernels.outside import python_state
from kvfold.nn.checks import (
    Hidden,
    check_call,
    check_epsilon,
    check_inputs,
    check_latent_cache,
    check_options,
    check_weights,
)
from kvfold.nn.turns import CosSin, turns_of
from kvfold.ops.latent import into_latents, out_of_latents
from kvfold.ops.rope import Rotary


class LatentAttention(nn.Module):
    """Attention whose heads read keys and values out of one latent per token (arXiv 2405.04434).

    The latent is ``c = norm(W_c x)``, ``kv_lora_rank`` numbers; head h has keys
    ``[W_k^h c | k]`` and values ``W_v^h c``, where k is one rotary key for all heads. Without a
    cache, and for the first tokens in one, keys and values are expanded. What is cached is read in
    the absorbed form: ``q_h . W_k^h c = (W_k^h)^T q_h . c``, so that latents stay as they are, and
    are read once for all heads.

    The weights are ``q_proj`` or ``q_a_proj``, ``q_a_layernorm`` and ``q_b_proj``;
    ``kv_a_proj_with_mqa``, ``kv_a_layernorm``, ``kv_b_proj`` and ``o_proj``: the ``state_dict`` of
    a DeepSeek-V2, DeepSeek-V3 or Youtu attention loads as it is.

    Args:
        hidden_size: width of input and output (C).
        num_heads: Hq.
        kv_lora_rank: numbers of the latent.
        qk_nope_head_dim, qk_rope_head_dim: numbers of a head's key from the latent, and from the
            shared rotary key.
        v_head_dim: Dv; ``qk_nope_head_dim`` by default.
        q_lora_rank: numbers of the queries' own latent; None for one projection.
        bias: whether ``q_a_proj``, ``kv_a_proj_with_mqa`` and ``o_proj`` have biases.
        norm_eps: epsilon of the latents' RMS norms.
        rotary: of the rotary keys and queries, whose size it must have; by default
            ``Rotary(qk_rope_head_dim, interleaved=True)``, as DeepSeek's are.
        scale: of the scores, ``(qk_nope_head_dim + qk_rope_head_dim) ** -0.5`` by default. Models
            with YaRN scale theirs.
        dropout: probability of dropping an attention weight, while training.
        device, dtype: of the weights.

    Raises:
        InputError: for sizes and options that do not fit, naming them.

    >>> layer = LatentAttention(
    ...     64, num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8
    ... )
    >>> x = torch.randn(1, 5, 64)
    >>> layer(x).shape
    torch.Size([1, 5, 64])
    >>> with torch.inference_mode():  # the same, a token at a time
    ...     cache = layer.new_cache(dtype="fp32")
    ...     steps = [layer(x[:, t : t + 1], cache=cache) for t in range(5)]
    ...     torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-5)
    True
    """

    causal = True
    window = softcap = None
    sinks = 0

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int | None = None,
        q_lora_rank: int | None = None,
        bias: bool = False,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        v_head_dim = qk_nope_head_dim if v_head_dim is None else v_head_dim
        check_sizes(
            hidden_size=hidden_size, num_heads=num_heads, kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim, q_lora_rank=q_lora_rank,
        )  # fmt: skip
        check_switches(bias=bias)
        check_weights(device, dtype)
        head_dim = qk_nope_head_dim + qk_rope_head_dim
        #: Sizes of the heads as they are without a cache: one KV head for each query head.
        self.geometry = AttentionGeometry(
            1, num_heads, num_heads, head_dim, v_head_dim, hidden_size
        )
        self.kv_hidden_size = hidden_size
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.rotary = Rotary(qk_rope_head_dim, interleaved=True) if rotary is None else rotary
        self.scale = head_dim**-0.5 if scale is None else scale
        self.dropout = dropout
        check_rotary(self.rotary, qk_rope_head_dim)
        if self.rotary.dim != qk_rope_head_dim:
            sizes = f"rotary dim={self.rotary.dim} with qk_rope_head_dim={qk_rope_head_dim}"
            raise InputError(f"{sizes}: the rotary part is turned as a whole")
        check_options(self, None)
        check_epsilon("norm_eps", norm_eps)

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def norm(width: int) -> nn.RMSNorm:
            return nn.RMSNorm(width, eps=norm_eps, device=device, dtype=dtype)

        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, num_heads * head_dim)
        else:
            self.q_a_proj = linear(hidden_size, q_lora_rank, bias)
            self.q_a_layernorm = norm(q_lora_rank)
            self.q_b_proj = linear(q_lora_rank, num_heads * head_dim)
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj_with_mqa = linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias)
        self.kv_a_layernorm = norm(kv_lora_rank)
        self.kv_b_proj = linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
        self.o_proj = linear(num_heads * v_head_dim, hidden_size, bias)

    def new_cache(
        self, batch: int = 1, *, dtype: Dtype = "bf16", kind: str = "contiguous", **options: Any
    ) -> LatentCache:
        """An empty cache for ``batch`` sequences; options as of ``LatentCache``."""
        sizes = self.kv_lora_rank, self.qk_rope_head_dim
        return LatentCache(*sizes, batch=batch, dtype=dtype, kind=kind, **options)

    def forward(
        self,
        x: torch.Tensor,
        *,
        start: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> torch.Tensor:
        """Attend to ``x`` itself, and to what is cached before it.

        S is the number of keys: x's tokens, or all in the cache with x.

        Args:
            x: ``[B, T, C]`` in the weights' dtype.
            start: int ``[B]``; keys before ``start[b]`` are padding (left padding), in the cache
                too.
            lengths: int ``[B]``; from ``lengths[b]`` on all tokens are padding (right padding).
                With a cache, only for the first tokens; padding does not enter it.
            mask: ``[B, Hq, T, S]`` or broadcastable to it, boolean (True: may be seen) or added
                to the scores.
            positions: ``[T]`` or ``[B, T]``; by default they count from 0, or on from what is
                cached.
            cache: of ``new_cache``; without gradients or dropout.

        Returns:
            ``[B, T, C]``.

        Raises:
            InputError: for shapes, dtypes or options that do not fit, naming them; for a cache
                where gradients are needed.
        """
        given = x, Hidden(start, lengths, mask), positions, cache
        return self._attend(*given) if cache is None else self._attend_outside_graphs(*given)

    def _attend(
        self,
        x: torch.Tensor,
        hidden: Hidden,
        positions: torch.Tensor | None,
        cache: LatentCache | None,
    ) -> torch.Tensor:
        check_inputs(self, x, None, hidden)
        if cache is not None:
            sizes = self.kv_lora_rank, self.qk_rope_head_dim
            check_latent_cache(self, cache, sizes, x, hidden)
        past = [] if cache is None else list(cache.lengths)
        check_call(self, x, max(past, default=0) + x.shape[1], hidden)
        turns = turns_of(self.rotary, x, positions, past)
        q, (c, k_rope) = self._queries(x, turns), self._latents(x, turns)
        if cache is not None:
            _append(cache, c, k_rope, hidden.lengths)
        if cache is None or not any(past):
            heads = self._expanded(q, c, k_rope, hidden, cache is None)
        else:
            heads = self._absorbed(q, cache, hidden)
        return cast(torch.Tensor, self.o_proj(heads.transpose(1, 2).flatten(2)))

    _attend_outside_graphs = python_state(_attend)

    def _queries(self, x: torch.Tensor, turns: CosSin) -> torch.Tensor:
        """``[B, Hq, T, qk_nope_head_dim + qk_rope_head_dim]``, the rotary part turned."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (-1, self.geometry.head_dim)).transpose(1, 2)
        nope, rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        return torch.cat([nope, self.rotary.apply(rope, *turns)], -1)

    def _latents(self, x: torch.Tensor, turns: CosSin) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached: ``[B, T, kv_lora_rank]`` and ``[B, T, qk_rope_head_dim]``."""
        c, k = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        return self.kv_a_layernorm(c), self.rotary.apply(k[:, None], *turns)[:, 0]

    def _expanded(
        self, q: torch.Tensor, c: torch.Tensor, k_rope: torch.Tensor, hidden: Hidden, training: bool
    ) -> torch.Tensor:
        """Every head's own keys and values of the tokens at hand: ``[B, Hq, T, Dv]``."""
        each = self.qk_nope_head_dim + self.geometry.v_head_dim
        both = self.kv_b_proj(c).unflatten(-1, (-1, each)).transpose(1, 2)
        k_nope, v = both.split([self.qk_nope_head_dim, self.geometry.v_head_dim], -1)
        shared = k_rope[:, None].expand(-1, self.geometry.num_heads, -1, -1)
        k = torch.cat([k_nope, shared], -1)
        # Causal queries never see the padding on their right, and stand where they are.
        options = replace(hidden, lengths=None).options
        dropout = self.dropout if self.training and training else 0.0
        out = attention(q, k, v, causal=True, scale=self.scale, dropout=dropout, **options)
        return cast(torch.Tensor, out)

    def _absorbed(self, q: torch.Tensor, cache: LatentCache, hidden: Hidden) -> torch.Tensor:
        """The same of everything in the cache, whose rows are keys and values as they are."""
        each = self.qk_nope_head_dim + self.geometry.v_head_dim
        weight = self.kv_b_proj.weight.unflatten(0, (-1, each))
        to_key, to_value = weight.split([self.qk_nope_head_dim, self.geometry.v_head_dim], 1)
        nope, rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        rows = torch.cat([into_latents(nope, to_key), rope], -1)
        mask = hidden.mask if hidden.mask is None else hidden.mask[..., : max(cache.lengths)]
        out = cache.attend(rows, scale=self.scale, start=hidden.start, mask=mask)
        return out_of_latents(cast(torch.Tensor, out), to_value)

    @property
    def _slides(self) -> int | None:
        return None

    @property
    def _sight(self) -> dict[str, Any]:
        return {"causal": True}

    @property
    def _scoring(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def extra_repr(self) -> str:
        """What ``print`` shows besides the weights."""
        g = self.geometry
        cached = f"{self.kv_lora_rank} + {self.qk_rope_head_dim} cached"
        return f"MLA, {g.num_heads} heads of {g.head_dim}, {cached}"


def _append(
    cache: LatentCache, c: torch.Tensor, k_rope: torch.Tensor, lengths: torch.Tensor | None
) -> None:
    """Append what is not padding."""
    if lengths is None:
        cache.append(c, k_rope)
        return
    for b, length in enumerate(lengths.tolist()):
        cache.append(c[b : b + 1, :length], k_rope[b : b + 1, :length], [b])
