"""What a fold makes of a model's attention, one declaration each. No torch.

A target answers every question about the folded model that can be answered before folding, and
travels from the boundary (``--kv-heads``, ``num_kv_heads``) to whatever asks. One more kind of
target is one more class here, a way to fold a layer to it (``fold.layer.LAYER_FOLDS``), and the
methods that declare that they can make it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvfold.arch.carried import Carried, rewritten
from kvfold.arch.family import Family
from kvfold.arch.latent import LAYOUTS, LatentProjections, Layout
from kvfold.arch.latent_carried import carried_to_latent, is_untied
from kvfold.arch.latent_config import check_latent, latent_config, rope_of
from kvfold.arch.projections import Projections
from kvfold.arch.sizes import Config
from kvfold.arguments import text
from kvfold.errors import InputError
from kvfold.geometry import AttentionGeometry, LatentGeometry
from kvfold.names import shown
from kvfold.numbers import KV_HEADS, LATENT_SIZE

_LATENT = re.compile(r"([0-9]{1,6})\+([0-9]{1,6})(?:/([1-9][0-9]{0,3}))?")
_LONGEST = 64
_VLLM_SIZES = ((256, 64), (512, 64))


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

    def geometry(
        self, source: AttentionGeometry, family: Family, config: Config
    ) -> AttentionGeometry:
        """The folded model's.

        Args:
            config: the source's.

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

    def carried(
        self, family: Family, config: Config, name: str, shape: tuple[int, ...]
    ) -> tuple[Carried, ...]:
        """What becomes of a tensor that is not attention."""

    def kv_bytes_per_token(self, source: AttentionGeometry) -> int:
        """Of the folded model's cache, at 16 bits."""

    def compared(self, source: AttentionGeometry) -> dict[str, Any]:
        """What it changes, before and after, for the record."""

    @property
    def warnings(self) -> Sequence[str]:
        """What those who use the folded model should know."""


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
        return "1 KV head" if self.num_kv_heads == 1 else f"{self.num_kv_heads} KV heads"

    def as_dict(self) -> dict[str, Any]:
        return {"num_kv_heads": self.num_kv_heads}

    def is_source(self, source: AttentionGeometry) -> bool:
        return self.num_kv_heads == source.num_kv_heads

    def geometry(
        self, source: AttentionGeometry, family: Family, config: Config
    ) -> AttentionGeometry:
        return source.with_kv_heads(self.num_kv_heads)

    def config(self, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
        return family.folded_config(config, self.num_kv_heads)

    def projections(self, family: Family) -> Projections:
        return family.target_projections or family.projections

    def carried(
        self, family: Family, config: Config, name: str, shape: tuple[int, ...]
    ) -> tuple[Carried, ...]:
        return rewritten(family, name, shape)

    def kv_bytes_per_token(self, source: AttentionGeometry) -> int:
        return source.with_kv_heads(self.num_kv_heads).kv_bytes_per_token()

    def compared(self, source: AttentionGeometry) -> dict[str, Any]:
        return {"num_kv_heads": {"source": source.num_kv_heads, "folded": self.num_kv_heads}}

    @property
    def warnings(self) -> Sequence[str]:
        return []


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): one latent and one rotary key for all heads.

    Attributes:
        rank: numbers of the latent; one of them holds a constant. rotary: of the rotary key.
        stride: the rotary key has every so-manieth of the source's frequencies, from the highest.
        layout: what it is stored as; a name in ``arch.latent.LAYOUTS``.
        padded: rank and rotary size with zeros behind, for engines that take certain sizes only.
    """

    rank: int
    rotary: int
    stride: int = 1
    layout: str = "deepseek_v3"
    padded: tuple[int, int] | None = None

    @classmethod
    def read(cls, words: str, name: str) -> "Latent":
        """Of words: ``160+32``, or ``160+32/2`` for every second frequency.

        Raises:
            InputError: for others.
        """
        found = _LATENT.fullmatch(words.strip()) if len(words) <= _LONGEST else None
        if found is None:
            raise InputError(
                f"{name} {shown(words)}: expected RANK+ROTARY, two whole numbers",
                "for instance 160+32: a latent of 160 numbers and a rotary key of 32",
            )
        rank, rotary, stride = (int(part or 1) for part in found.groups())
        if rank < 2:
            raise InputError(f"{name} {words}: expected a rank of at least 2, one of it a constant")
        return cls(LATENT_SIZE.check(rank, name, words), rotary, stride)

    @classmethod
    def spelled(cls, value: object, name: str) -> str:
        """What somebody gave for one, checked, in one spelling; as :meth:`read`."""
        return cls.read(text(value, name), name).words

    @property
    def label(self) -> str:
        return f"a latent of {self.words} numbers"

    @property
    def words(self) -> str:
        """As it is asked for."""
        return f"{self.rank}+{self.rotary}" + (f"/{self.stride}" if self.stride > 1 else "")

    @property
    def stored(self) -> Layout:
        """What it is stored as."""
        return LAYOUTS[self.layout]

    @property
    def cached(self) -> tuple[int, int]:
        """Rank and rotary size as they are stored."""
        return self.padded or (self.rank, self.rotary)

    def as_dict(self) -> dict[str, Any]:
        padded = None if self.padded is None else list(self.padded)
        return {"latent": self.words, "layout": self.layout, "padded": padded}

    def is_source(self, source: AttentionGeometry) -> bool:
        return False

    def frequencies(self, rotary_dim: int) -> tuple[int, ...]:
        """Which of a layer's frequencies the rotary key has; none in a layer without rotary."""
        kept = self.stride * self.rotary // 2 if rotary_dim else 0
        return tuple(range(0, kept, self.stride))

    def geometry(self, source: AttentionGeometry, family: Family, config: Config) -> LatentGeometry:
        check_latent(family, config)
        self._check_sizes(source, family.rotary_dim(config, source))
        nope = source.head_dim  # all of a query, as one rotary key leaves something of every number
        rank, rotary = self.cached
        return LatentGeometry(
            source.num_layers,
            source.num_heads,
            source.num_heads,
            nope + rotary,
            source.v_head_dim,
            source.hidden_size,
            rank,
            rotary,
            source.hidden_size if self.stored.two_steps else 0,
        )

    def config(self, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
        source = family.geometry(config)
        rotary_dim = family.rotary_dim(config, source)
        geometry = self.geometry(source, family, config)
        kept, size = self.rotary // 2, self.cached[1]
        rope = rope_of(config, rotary_dim, kept, self.stride, size, self.stored)
        made = latent_config(config, geometry, self.stored, rope)
        return made | {"tie_word_embeddings": not is_untied(family, config, self.stored)}

    def projections(self, family: Family) -> Projections:
        return LatentProjections(bias=self.stored.bias)

    def carried(
        self, family: Family, config: Config, name: str, shape: tuple[int, ...]
    ) -> tuple[Carried, ...]:
        return carried_to_latent(family, config, self.stored, name, shape)

    def kv_bytes_per_token(self, source: AttentionGeometry) -> int:
        return 2 * source.num_layers * sum(self.cached)

    def compared(self, source: AttentionGeometry) -> dict[str, Any]:
        numbers = source.num_kv_heads * (source.head_dim + source.v_head_dim)
        rank, rotary = self.cached
        return {
            "num_kv_heads": {"source": source.num_kv_heads, "folded": source.num_heads},
            "kv_numbers": {"source": numbers, "folded": rank + rotary},
            "latent": {"rank": rank, "rotary": rotary, "layout": self.layout},
        }

    @property
    def warnings(self) -> Sequence[str]:
        if "vLLM" not in self.stored.engines or self.cached in _VLLM_SIZES:
            return []
        sizes = " and ".join(f"{rank}+{rotary}" for rank, rotary in _VLLM_SIZES)
        return [
            f"vLLM takes latents of {sizes} only, on CPUs 512+64: pad this one with --pad to use "
            "it there"
        ]

    def _check_sizes(self, source: AttentionGeometry, rotary_dim: int) -> None:
        """Refuse what the source has no room for.

        Raises:
            InputError: naming the sizes there can be.
        """
        name, most = f"--latent {self.words}", rotary_dim // self.stride
        if not 2 <= self.rotary <= most or self.rotary % 2:
            raise InputError(
                f"{name}: expected a rotary size that is even and at least 2, at most {most}, "
                "as the source's keys have",
                f"for instance {self.rank}+{max(2, most // 4 * 2)}",
            )
        numbers = source.num_kv_heads * (source.head_dim + source.v_head_dim)
        asked = self.rank + self.rotary
        if asked > numbers:
            raise InputError(
                f"{name}: {asked} numbers a token and layer is {asked / numbers:.0%} of the "
                f"source's {numbers}",
                f"expected fewer than {numbers}: the cache is to shrink",
            )
        if self.padded and (self.padded[0] < self.rank or self.padded[1] < self.rotary):
            rank, rotary = self.padded
            raise InputError(
                f"--pad {rank}+{rotary}: expected at least {self.rank}+{self.rotary}, as --latent"
            )
        if self.padded and self.padded[1] % 2:
            raise InputError(
                f"--pad {self.padded[0]}+{self.padded[1]}: expected an even rotary size"
            )


def heads_or_latent(num_kv_heads: int, latent: str | None) -> Target:
    """What is told of a model in two entries: a latent's words, or else a number of heads."""
    return Grouped(num_kv_heads) if latent is None else Latent.read(latent, "latent")
