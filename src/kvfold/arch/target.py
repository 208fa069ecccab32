"""What a fold makes of a model's attention, one declaration each. No torch.

A target answers every question about the folded model that can be answered before folding, and
travels from the boundary (``--kv-heads``, ``num_kv_heads``) to whatever asks. One more kind of
target is one more class here, a way to fold a layer to it (``fold.layer.LAYER_FOLDS``), and the
methods that declare that they can make it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kvfold.arch.family import Family
from kvfold.arch.projections import Projections
from kvfold.geometry import AttentionGeometry
from kvfold.numbers import KV_HEADS


class Target(Protocol):
    """What is the same of every kind of target.

    Attributes:
        label: what it is called in sentences.
    """

    @property
    def label(self) -> str: ...

    def as_dict(self) -> dict[str, Any]:
        """Its entries in a request."""

    def is_source(self, source: AttentionGeometry) -> bool:
        """Whether the source is like this already, so that nothing need be folded."""

    def geometry(self, source: AttentionGeometry) -> AttentionGeometry:
        """The folded model's.

        Raises:
            InputError: if a model of the source's geometry cannot be folded to this.
        """

    def config(self, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
        """The folded model's config; a copy, everything else untouched.

        Raises:
            UnsupportedError: if the family has no way to say it.
        """

    def projections(self, family: Family) -> Projections:
        """How the folded model stores its attention."""

    def kv_bytes_per_token(self, source: AttentionGeometry) -> int:
        """Of the folded model's cache, at 16 bits."""

    def compared(self, source: AttentionGeometry) -> dict[str, Any]:
        """What it changes, before and after, for the record."""


@dataclass(frozen=True)
class Grouped:
    """Fewer KV heads of the source's kind: grouped-query and, with one, multi-query attention."""

    num_kv_heads: int

    @classmethod
    def asked(cls, num_kv_heads: object, name: str) -> "Grouped":
        """Of a number that somebody gave, which the complaint calls ``name``."""
        return cls(KV_HEADS.check(num_kv_heads, name))

    @property
    def label(self) -> str:
        return f"{self.num_kv_heads} KV heads"

    def as_dict(self) -> dict[str, Any]:
        return {"num_kv_heads": self.num_kv_heads}

    def is_source(self, source: AttentionGeometry) -> bool:
        return self.num_kv_heads == source.num_kv_heads

    def geometry(self, source: AttentionGeometry) -> AttentionGeometry:
        return source.with_kv_heads(self.num_kv_heads)

    def config(self, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
        return family.folded_config(config, self.num_kv_heads)

    def projections(self, family: Family) -> Projections:
        return family.target_projections or family.projections

    def kv_bytes_per_token(self, source: AttentionGeometry) -> int:
        return self.geometry(source).kv_bytes_per_token()

    def compared(self, source: AttentionGeometry) -> dict[str, Any]:
        return {"num_kv_heads": {"source": source.num_kv_heads, "folded": self.num_kv_heads}}


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): one latent and one rotary key for all heads.

    Attributes:
        rank: numbers of the latent; one of them holds a constant. rotary: of the rotary key.
        stride: the rotary key has every so-manieth of the source's frequencies, from the highest.
    """

    rank: int
    rotary: int
    stride: int = 1

    @property
    def label(self) -> str:
        return f"a latent of {self.rank}+{self.rotary} numbers"
