"""Attention as a layer: projections, positions, masks and cache around ``kvfold.attention``."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from kvfold.cache.checks import check_sizes, check_switches
from kvfold.cache.kv import Dtype, KVCache
from kvfold.errors import InputError
from kvfold.geometry import AttentionGeometry
from kvfold.kernels.dispatch import attention
from kvfold.kernels.outside import python_state
from kvfold.nn.checks import (
    Hidden,
    check_cache,
    check_call,
    check_inputs,
    check_options,
    check_weights,
)
from kvfold.nn.turns import CosSin, turns_of
from kvfold.ops.mask import visible
from kvfold.ops.options import Scoring, Visibility, Window, reach
from kvfold.ops.reference import attend
from kvfold.ops.rope import Rotary


class GroupedQueryAttention(nn.Module):
    """Multi-head attention whose query heads share key/value heads (GQA, arXiv 2305.13245).

    ``num_kv_heads == num_heads`` is multi-head attention, ``num_kv_heads == 1`` multi-query
    attention (arXiv 1911.02150). Keys and values are never repeated. The weights are ``q_proj``,
    ``k_proj``, ``v_proj``, ``o_proj`` and, with ``qk_norm``, ``q_norm`` and ``k_norm``: the
    ``state_dict`` of a Llama, Mistral, Qwen2 or Qwen3 attention loads as it is.

    Args:
        hidden_size: width of input and output (C).
        num_heads, num_kv_heads: Hq and Hkv; Hkv divides Hq.
        head_dim, v_head_dim: D and Dv; ``hidden_size / num_heads`` and ``head_dim`` by default.
        kv_hidden_size: width of the context, for cross-attention; ``hidden_size`` by default.
        qkv_bias, out_bias: whether q, k and v, and o, have biases.
        qk_norm: epsilon of an RMS norm of each query and key head before rotary embedding
            (arXiv 2010.04245), or None for no norm.
        rotary: rotary position embedding (arXiv 2104.09864), or None; see ``Rotary``.
        causal: a token sees no later ones. False for encoders and for cross-attention.
        window: a token sees only the last ``window`` ones, itself included, and the first
            ``sinks``; or, as a pair ``(left, right)``, so many before and after it.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        scale: of the scores, ``head_dim ** -0.5`` by default.
        dropout: probability of dropping an attention weight, while training.
        device, dtype: of the weights.

    Raises:
        InputError: for sizes and options that do not fit, naming them.

    >>> layer = GroupedQueryAttention(64, num_heads=8, num_kv_heads=2, rotary=Rotary(8))
    >>> x = torch.randn(1, 5, 64)
    >>> layer(x).shape
    torch.Size([1, 5, 64])
    >>> with torch.inference_mode():  # the same, a token at a time
    ...     cache = layer.new_cache(dtype="fp32")
    ...     steps = [layer(x[:, t : t + 1], cache=cache) for t in range(5)]
    ...     torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        kv_hidden_size: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: float | None = None,
        rotary: Rotary | None = None,
        causal: bool = True,
        window: Window | None = None,
        sinks: int = 0,
        softcap: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_heads=num_heads, hidden_size=hidden_size)
        check_switches(qkv_bias=qkv_bias, out_bias=out_bias, causal=causal)
        check_weights(device, dtype)
        if head_dim is None:
            if hidden_size % num_heads:
                sizes = f"num_heads={num_heads} does not divide hidden_size={hidden_size}"
                raise InputError(sizes, "give head_dim")
            head_dim = hidden_size // num_heads
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        #: Sizes and what follows from them: parameters, FLOPs, cache bytes.
        self.geometry = AttentionGeometry(
            1, num_heads, num_kv_heads, head_dim, v_head_dim, hidden_size
        )
        self.kv_hidden_size = hidden_size if kv_hidden_size is None else kv_hidden_size
        self.rotary, self.causal, self.window, self.sinks = rotary, causal, window, sinks
        self.softcap, self.scale, self.dropout = softcap, scale, dropout
        check_options(self, qk_norm)

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(hidden_size, num_heads * head_dim, qkv_bias)
        self.k_proj = linear(self.kv_hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = linear(self.kv_hidden_size, num_kv_heads * v_head_dim, qkv_bias)
        self.o_proj = linear(num_heads * v_head_dim, hidden_size, out_bias)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            self.q_norm = nn.RMSNorm(head_dim, eps=qk_norm, device=device, dtype=dtype)
            self.k_norm = nn.RMSNorm(head_dim, eps=qk_norm, device=device, dtype=dtype)

    def new_cache(
        self,
        batch: int = 1,
        *,
        dtype: Dtype | tuple[Dtype, Dtype] = "bf16",
        kind: str = "contiguous",
        **options: Any,
    ) -> KVCache:
        """An empty cache for ``batch`` sequences that fits this layer; options as of ``KVCache``.

        ``kind="sliding"`` keeps the layer's window and sinks.

        Raises:
            InputError: for what cannot be, such as a sliding cache for a layer without a window.
        """
        if isinstance(kind, str) and kind == "sliding":
            options = {"window": self._slides, "sinks": self.sinks, **options}
        g = self.geometry
        return KVCache(
            g.num_kv_heads, g.head_dim, v_head_dim=g.v_head_dim, batch=batch, dtype=dtype,
            kind=kind, **options,
        )  # fmt: skip

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        start: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend to ``x`` itself, to what is cached before it, or to ``context``.

        S is the number of keys: x's tokens, or all in the cache with x, or the context's.

        Args:
            x: ``[B, T, C]`` in the weights' dtype.
            context: ``[B, S, kv_hidden_size]``, for cross-attention (``causal=False``).
            start: int ``[B]``; keys before ``start[b]`` are padding (left padding), in the cache
                too.
            lengths: int ``[B]``; of the tokens given, from ``lengths[b]`` on all are padding
                (right padding). Outputs for padded queries mean nothing. With a cache, only for
                the first tokens; padding does not enter it.
            mask: ``[B, Hq, T, S]`` or broadcastable to it, boolean (True: may be seen) or added
                to the scores. A ``[B, S]`` mask of real tokens is ``keep[:, None, None]``.
            positions: ``[T]`` or ``[B, T]``, for rotary embedding; by default they count from 0,
                or on from what is cached.
            cache: of ``new_cache``; without gradients or dropout. Self-attention appends x's keys
                and values and attends to all; cross-attention fills an empty cache with the
                context's, and reads only the cache in later calls.
            need_weights: also return the attention weights: a second computation, for looking at.

        Returns:
            ``[B, T, C]``; with ``need_weights`` also the weights without dropout,
            ``[B, Hq, T, S]`` float32 (float64 if x is), of which each row sums to 1, or to 0 if
            the query sees nothing.

        Raises:
            InputError: for shapes, dtypes or options that do not fit, naming them; for a cache
                where gradients are needed.
        """
        given = x, context, Hidden(start, lengths, mask), positions, cache, need_weights
        return self._attend(*given) if cache is None else self._attend_outside_graphs(*given)

    def _attend(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None,
        hidden: Hidden,
        positions: torch.Tensor | None,
        cache: KVCache | None,
        need_weights: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        start, lengths = hidden.start, hidden.lengths
        check_switches(need_weights=need_weights)
        check_inputs(self, x, context, hidden)
        if cache is not None:
            check_cache(self, cache, x, context, hidden)
        first = cache is None or not any(cache.lengths)
        past = 0 if cache is None or context is not None else max(cache.lengths, default=0)
        check_call(self, x, past + (x if context is None else context).shape[1], hidden)
        cos_sin, always = self._cos_sin(x, positions, cache), self._sight | self._scoring
        q = self._normed(self._heads(self.q_proj(x), self.geometry.head_dim), self.q_norm, cos_sin)
        if cache is None or first:
            k, v = self._keys_values(x if context is None else context, cos_sin)
            # Causal queries never see the padding on their right, and stand where they are.
            hidden = replace(hidden, lengths=None) if self.causal else hidden
            dropout = self.dropout if self.training and cache is None else 0.0
            out = attention(q, k, v, **hidden.options, **always, dropout=dropout)
            weights = self._weights(q, k, v, hidden) if need_weights else None
            if cache is not None:
                _append(cache, k, v, lengths)
        else:
            if context is None:
                cache.append(*self._keys_values(x, cos_sin))
            hidden = _of_cache(hidden, cache, q.device)
            out = cache.attend(q, start=start, mask=hidden.mask, **always)
            weights = self._weights(q, *_decoded(cache), hidden) if need_weights else None
        mixed = self.o_proj(cast(torch.Tensor, out).transpose(1, 2).flatten(2))
        return mixed if weights is None else (mixed, weights)

    _attend_outside_graphs = python_state(_attend)

    def _cos_sin(
        self, x: torch.Tensor, positions: torch.Tensor | None, cache: KVCache | None
    ) -> CosSin | None:
        if self.rotary is None:
            return None
        return turns_of(self.rotary, x, positions, [] if cache is None else cache.lengths)

    def _heads(self, projected: torch.Tensor, dim: int) -> torch.Tensor:
        """``[B, T, H dim]`` to ``[B, H, T, dim]``."""
        return projected.unflatten(-1, (-1, dim)).transpose(1, 2)

    def _normed(
        self, heads: torch.Tensor, norm: nn.RMSNorm | None, cos_sin: CosSin | None
    ) -> torch.Tensor:
        """Queries or keys ``[B, H, T, D]`` after norm and rotary embedding, in their dtype."""
        out = heads if norm is None else norm(heads.to(norm.weight.dtype))
        if self.rotary is not None and cos_sin is not None:
            out = self.rotary.apply(out, *cos_sin)
        return out.to(heads.dtype)

    def _keys_values(
        self, x: torch.Tensor, cos_sin: CosSin | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k = self._heads(self.k_proj(x), self.geometry.head_dim)
        v = self._heads(self.v_proj(x), self.geometry.v_head_dim)
        return self._normed(k, self.k_norm, cos_sin), v

    @property
    def _slides(self) -> int | None:
        """The window of a sliding cache for this layer: of its last tokens, or None."""
        left, right = reach(self.causal, self.window)
        return left + 1 if left is not None and right == 0 else None

    @property
    def _sight(self) -> dict[str, Any]:
        """Which keys a query always sees."""
        return {"causal": self.causal, "window": self.window, "sinks": self.sinks}

    @property
    def _scoring(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap}

    def _weights(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: Hidden
    ) -> torch.Tensor:
        """Attention weights ``[B, Hq, T, S]``, in float32 or better."""
        left, right = reach(self.causal, self.window)
        sight = Visibility(left, right, self.sinks, hidden.start, hidden.lengths)
        bias, seen = hidden.mask, visible(q.shape[2], k.shape[2], sight, q.device)
        if bias is not None and bias.dtype == torch.bool:
            seen, bias = seen & bias, None
        q, k, v = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q, k, v))
        scoring = Scoring(self.scale, self.softcap)
        found = attend(q, k, v, scoring=scoring, seen=seen, bias=bias, need_weights=True)
        return cast(torch.Tensor, found.weights)

    def extra_repr(self) -> str:
        """What ``print`` shows besides the weights."""
        g = self.geometry
        return f"{g.kind}, {g.num_heads} heads of {g.head_dim}, {g.num_kv_heads} KV heads"


def _append(cache: KVCache, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None) -> None:
    """Append what is not padding."""
    if lengths is None:
        cache.append(k, v)
        return
    for b, length in enumerate(lengths.tolist()):
        cache.append(k[b : b + 1, :, :length], v[b : b + 1, :, :length], [b])


def _of_cache(hidden: Hidden, cache: KVCache, device: torch.device) -> Hidden:
    """The same for a cache, which has the lengths and may hold less than the padded context."""
    mask = hidden.mask if hidden.mask is None else hidden.mask[..., : max(cache.lengths)]
    return replace(
        hidden, mask=mask, lengths=torch.tensor(cache.lengths, dtype=torch.int32, device=device)
    )


def _decoded(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything in the cache: float32 ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``."""
    read = [cache.read(b) for b in range(cache.batch)]
    keys, values = ([x.transpose(0, 1) for x in side] for side in zip(*read, strict=True))
    pad = nn.utils.rnn.pad_sequence
    return pad(keys, True).transpose(1, 2), pad(values, True).transpose(1, 2)
