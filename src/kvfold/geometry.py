"""All arithmetic about heads, bytes and parameters. No torch."""

from dataclasses import dataclass, replace

from kvfold.errors import InputError


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number`` in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, number + 1) if number % n == 0]


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
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
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
        elements = self.num_layers * self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return elements * bits // 8

    def attention_parameters(self) -> int:
        """Weights (without biases) of q, k, v and o over all layers."""
        query_side = self.num_heads * (self.head_dim + self.v_head_dim)
        kv_side = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return self.num_layers * self.hidden_size * (query_side + kv_side)

    def with_kv_heads(self, num_kv_heads: int) -> "AttentionGeometry":
        """Return the geometry after folding to ``num_kv_heads``.

        Raises:
            InputError: if ``num_kv_heads`` is not a divisor of this geometry's.
        """
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
