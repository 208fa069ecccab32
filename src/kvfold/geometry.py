"""All arithmetic about heads, bytes, parameters and FLOPs. No torch."""

from dataclasses import dataclass, replace
from math import isqrt

from kvfold.errors import InputError
from kvfold.numbers import KV_HEADS, Whole


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number`` in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, isqrt(max(0, number)) + 1) if number % n == 0]
    large = [number // n for n in reversed(small) if n * n != number]
    return small + large


_HINT = "check the model's head counts"
HEADS = Whole(1, 1 << 16, _HINT)
_FIELDS = {"num_layers": Whole(1, 10_000, _HINT), "hidden_size": Whole(1, 1 << 22, _HINT)}
_BITS = Whole(1, 64, "16 and 8 are usual")
_SOME_TOKENS = Whole(0, 1 << 50, "for instance 512")


@dataclass(frozen=True)
class AttentionGeometry:
    """How many heads a decoder has and how wide they are.

    ``hidden_size`` is never assumed to be ``num_heads * head_dim``.

    >>> mha = AttentionGeometry(32, 32, 32, 128, 128, 4096)
    >>> mha.with_kv_heads(8).group_size
    4
    >>> mha.kv_bytes_per_token() // mha.with_kv_heads(8).kv_bytes_per_token()
    4
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    hidden_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _FIELDS.get(name, HEADS).check(value, name)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}",
                f"the config must name one of {divisors(self.num_heads)} KV heads",
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head (R)."""
        return self.num_heads // self.num_kv_heads

    @property
    def kind(self) -> str:
        """``MHA``, ``GQA`` or ``MQA``."""
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    def kv_bytes_per_token(self, bits: int = 16) -> int:
        """Bytes the KV cache grows by for each token of one sequence, over all layers."""
        bits = _BITS.check(bits, "bits")
        elements = self.num_layers * self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return elements * bits // 8

    def kv_parameters(self, *, bias: bool = False, kv_hidden_size: int | None = None) -> int:
        """Weights of k and v over all layers, with their biases if asked for.

        Args:
            kv_hidden_size: width of what keys and values are made from, if it is not
                ``hidden_size`` (cross-attention).
        """
        width = self.hidden_size
        if kv_hidden_size is not None:
            width = _FIELDS["hidden_size"].check(kv_hidden_size, "kv_hidden_size")
        return (
            self.num_layers * self.num_kv_heads * (self.head_dim + self.v_head_dim) * (width + bias)
        )

    def query_parameters(self, *, qkv_bias: bool = False, out_bias: bool = False) -> int:
        """Weights of q and o over all layers, which folding leaves as they are."""
        rows = self.num_heads * self.head_dim * (self.hidden_size + qkv_bias)
        columns = (self.num_heads * self.v_head_dim + out_bias) * self.hidden_size
        return self.num_layers * (rows + columns)

    def attention_parameters(
        self,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        kv_hidden_size: int | None = None,
    ) -> int:
        """Parameters of attention over all layers: the weights of q, k, v and o, and options.

        Args:
            qkv_bias, out_bias: count the biases of q, k and v, and of o.
            qk_norm: count one weight per dimension of a query's and of a key's norm.
            kv_hidden_size: see ``kv_parameters``.
        """
        return (
            self.query_parameters(qkv_bias=qkv_bias, out_bias=out_bias)
            + self.kv_parameters(bias=qkv_bias, kv_hidden_size=kv_hidden_size)
            + 2 * qk_norm * self.num_layers * self.head_dim
        )

    def projection_flops(
        self, tokens: int, *, kv_tokens: int | None = None, kv_hidden_size: int | None = None
    ) -> int:
        """FLOPs of q, k, v and o for ``tokens`` tokens of one sequence, over all layers.

        A multiply-add counts as two; biases, norms and rotary embedding are left out.

        Args:
            kv_tokens: tokens that keys and values are made of, if not the same ones
                (cross-attention; 0 when they are cached).
            kv_hidden_size: see ``kv_parameters``.
        """
        tokens = _SOME_TOKENS.check(tokens, "tokens")
        kv_tokens = tokens if kv_tokens is None else _SOME_TOKENS.check(kv_tokens, "kv_tokens")
        kv_side = self.kv_parameters(kv_hidden_size=kv_hidden_size)
        return 2 * (tokens * self.query_parameters() + kv_tokens * kv_side)

    def attention_flops(self, tokens: int, context: int) -> int:
        """FLOPs of q kᵀ and of weights times v, over all layers, for one sequence.

        ``tokens`` queries over ``context`` keys, the new ones included. Every pair is counted: a
        causal mask does not halve it, as in PyTorch's ``FlopCounterMode``. The number of KV heads
        changes what is read, not what is computed.
        """
        _SOME_TOKENS.check(tokens, "tokens")
        _SOME_TOKENS.check(context, "context")
        dims = self.head_dim + self.v_head_dim
        return 2 * self.num_layers * self.num_heads * tokens * context * dims

    def forward_flops(self, tokens: int, context: int | None = None) -> int:
        """FLOPs of projections and attention for ``tokens`` new tokens of one sequence.

        Args:
            context: tokens attended to, the new ones included; only the new ones by default.
        """
        context = tokens if context is None else context
        return self.projection_flops(tokens) + self.attention_flops(tokens, context)

    def decode_flops(self, context: int) -> int:
        """FLOPs of one decoding step: one new token, the last of ``context``.

        >>> AttentionGeometry(1, 8, 2, 16, 16, 64).decode_flops(context=1000)
        552960
        """
        return self.forward_flops(1, _SOME_TOKENS.check(context, "context"))

    def with_kv_heads(self, num_kv_heads: int) -> "AttentionGeometry":
        """Return the geometry after folding to ``num_kv_heads``.

        Raises:
            InputError: if ``num_kv_heads`` is not a divisor of this geometry's.
        """
        num_kv_heads = KV_HEADS.check(num_kv_heads, "--kv-heads")
        allowed = divisors(self.num_kv_heads)
        if num_kv_heads not in allowed:
            problem = (
                "is more than"
                if num_kv_heads > self.num_kv_heads
                else "is less than 1; the source has"
                if num_kv_heads < 1
                else "does not divide"
            )
            raise InputError(
                f"--kv-heads {num_kv_heads} {problem} the source's {self.num_kv_heads} KV heads"
                if num_kv_heads >= 1
                else f"--kv-heads {num_kv_heads}: expected at least 1 KV head",
                f"choose one of {', '.join(map(str, allowed))}",
            )
        return replace(self, num_kv_heads=num_kv_heads)


@dataclass(frozen=True)
class LatentGeometry(AttentionGeometry):
    """Of multi-head latent attention (arXiv 2405.04434), which caches a latent and a rotary key.

    Every query head has a KV head of its own, but none of them is cached; ``head_dim`` is that of
    queries, ``qk_rope_head_dim`` included. Queries are projected in two steps with a
    ``q_lora_rank``; 0 says that they are not.

    >>> LatentGeometry(27, 16, 16, 192, 128, 2048, 512, 64).kv_bytes_per_token() // (27 * 2)
    576
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    q_lora_rank: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "q_lora_rank":
                _FIELDS.get(name, HEADS).check(value, name)

    @property
    def qk_nope_head_dim(self) -> int:
        """Numbers of a query head that read the latent."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def kind(self) -> str:
        """``MLA``."""
        return "MLA"

    def kv_bytes_per_token(self, bits: int = 16) -> int:
        """Bytes that a token adds to the cache of one sequence, over all layers."""
        bits = _BITS.check(bits, "bits")
        return self.num_layers * (self.kv_lora_rank + self.qk_rope_head_dim) * bits // 8

    def kv_parameters(self, *, bias: bool = False, kv_hidden_size: int | None = None) -> int:
        """Weights of the latent, the rotary key, and of keys and values out of the latent."""
        width = self.hidden_size
        if kv_hidden_size is not None:
            width = _FIELDS["hidden_size"].check(kv_hidden_size, "kv_hidden_size")
        down = (self.kv_lora_rank + self.qk_rope_head_dim) * (width + bias)
        heads = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return self.num_layers * (down + heads * self.kv_lora_rank)

    def query_parameters(self, *, qkv_bias: bool = False, out_bias: bool = False) -> int:
        """Weights of the queries, in two steps or one, and of the output."""
        width, rows = self.hidden_size, self.num_heads * self.head_dim
        queries = rows * width
        if self.q_lora_rank:
            queries = self.q_lora_rank * (width + qkv_bias + rows)
        out = (self.num_heads * self.v_head_dim + out_bias) * width
        return self.num_layers * (queries + out)

    def with_kv_heads(self, num_kv_heads: int) -> "AttentionGeometry":
        """Refuse: there are no KV heads to share.

        Raises:
            InputError: always.
        """
        raise InputError(
            "latent attention keeps no KV heads that could be fewer", "fold the model it came from"
        )
