"""What to measure, checked before PyTorch is imported."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

from kvfold.arguments import choice, text
from kvfold.bench.peers import PEERS
from kvfold.bench.timing import DEFAULT_ROUNDS
from kvfold.errors import InputError
from kvfold.geometry import divisors
from kvfold.names import shown
from kvfold.numbers import BATCH, BUDGET, BYTES, CONTEXT, HEAD_DIM, HEADS, ROUNDS, THREADS, Wholes
from kvfold.ops.evict import Evict
from kvfold.ops.formats import FORMATS
from kvfold.quality.device import check_memory
from kvfold.requests import Listed, Request, Text, option

MOST_CASES = 1000
MOST_CACHES = 1 << 17  # that one competitor rotates over: each is an object too


@dataclass(frozen=True)
class AttentionCase:
    """One decode step of one layer: one query token, a cache of ``context`` tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    batch: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V in 16 bit."""
        return 4 * self.batch * self.num_kv_heads * self.context * self.head_dim


def check_peer(peer: object, name: str = "--against") -> str:
    """A peer's name.

    Raises:
        InputError: if there is no such peer.
    """
    return choice(peer, name, PEERS)


def check_dtype(dtype: object, name: str = "--dtype") -> str:
    """A cache dtype, or one for keys and one for values: ``int8/int4``.

    Raises:
        InputError: for anything else.
    """
    found = text(dtype, name)
    each = found.split("/")
    if len(each) > 2:
        raise InputError(
            f"{name} {shown(found)}: expected one dtype, or keys/values", "e.g. int8/int4"
        )
    for part in each:
        choice(part, name, FORMATS)
    return found


DTYPES = Listed(Text(check_dtype), none=True)
USUAL_DTYPES = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class TimedRequest(Request):
    """What every benchmark is told.

    Attributes:
        threads: PyTorch's, or None for as many as it uses now. working_set: bytes each competitor
            rotates over, or to read when measuring bandwidth.
    """

    rounds: int = option(
        "--rounds", ROUNDS, DEFAULT_ROUNDS, "Samples of each competitor.", shared=True
    )
    working_set: int = option(
        "--working-set",
        BYTES,
        1 << 30,
        "Bytes to rotate over, or to read when measuring bandwidth; several times the "
        "last-level cache.",
        shared=True,
    )
    threads: int | None = option(
        "--threads", THREADS, None, "Of PyTorch.  [default: all cores]", shared=True
    )


SELECT, EVICT = "read", "kept"


class Part(NamedTuple):
    """What of a cache steps see: everything, or a share that is read, or that was kept."""

    kind: str = ""
    share: float = 1.0

    @property
    def words(self) -> str:
        """As the cache's name goes on."""
        return f", {self.share:.4g} {self.kind}" if self.kind else ""


@dataclass(frozen=True)
class AttentionRequest(TimedRequest):
    """What ``kvfold bench attention`` measures; every combination of the lists.

    Attributes:
        dtypes: of kvfold's caches; ``int8/int4`` for INT8 keys and INT4 values.
        against: names of peers. selects: shares of their pages that caches read.
        evicts: shares of their tokens that caches keep.

    Raises:
        InputError: for what cannot be measured.
    """

    command = "bench attention"

    num_heads: int = option("--heads", HEADS, 32, "Query heads.")
    kv_heads: Sequence[int] = option("--kv-heads", Wholes(HEADS), (32, 8, 1), "Comma list.")
    head_dims: Sequence[int] = option("--head-dim", Wholes(HEAD_DIM), (128,), "Comma list.")
    contexts: Sequence[int] = option(
        "--context", Wholes(CONTEXT), (1024, 8192), "Tokens; comma list."
    )
    batches: Sequence[int] = option("--batch", Wholes(BATCH), (1,), "Sequences; comma list.")
    dtypes: Sequence[str] = option(
        "--dtype",
        DTYPES,
        USUAL_DTYPES,
        f"Of kvfold's caches: {', '.join(FORMATS)}, or keys/values: int8/int4; or none.",
    )
    against: Sequence[str] = option(
        "--against",
        Listed(Text(check_peer), none=True),
        ("sdpa", "sdpa-grouped", "matmul"),
        "Peers, all in bf16: sdpa (enable_gqa), sdpa-grouped (heads that share K and V as "
        "rows), repeat (K and V repeated, then sdpa), matmul, flex (compiles, slowly); or none.",
    )

    selects: Sequence[float] = option(
        "--select",
        Listed(BUDGET, none=True),
        (),
        "Also kvfold's caches that read such a share of their pages: 0.5,0.25.",
        metavar="SHARE,...",
    )
    evicts: Sequence[float] = option(
        "--evict",
        Listed(BUDGET, none=True),
        (),
        "Also kvfold's caches that keep such a share of their tokens: 0.5,0.25.",
        metavar="SHARE,...",
    )

    @property
    def parts(self) -> list[Part]:
        """What caches of each dtype are measured with."""
        some = [Part(SELECT, share) for share in self.selects]
        return [Part(), *some, *(Part(EVICT, share) for share in self.evicts)]

    def __post_init__(self) -> None:
        super().__post_init__()
        least = Evict.sinks + Evict.recent
        for share in self.evicts:
            kept = Evict(budget=share).tokens(min(self.contexts))
            if kept < least:
                raise InputError(
                    f"--evict {share} of {min(self.contexts)} tokens is {kept}; expected at least"
                    f" {least}, the first and last that are always kept",
                    "a longer --context",
                )
        for kv_heads in self.kv_heads:
            if self.num_heads % kv_heads:
                choices = ", ".join(map(str, divisors(self.num_heads)))
                raise InputError(
                    f"--kv-heads {kv_heads} does not divide --heads {self.num_heads}",
                    f"choose from {choices}",
                )
        if not self.dtypes and not self.against:
            raise InputError("nothing to measure", "name a --dtype or a peer (--against)")
        lists = (self.kv_heads, self.contexts, self.batches, self.head_dims)
        check_cases(prod(len(values) for values in lists))
        self._check_memory()

    def cases(self) -> Iterator[AttentionCase]:
        """In the order of the tables: by batch and head size, then context, then KV heads."""
        for batch in self.batches:
            for head_dim in self.head_dims:
                for context in self.contexts:
                    for kv_heads in self.kv_heads:
                        yield AttentionCase(self.num_heads, kv_heads, head_dim, context, batch)

    def _check_memory(self) -> None:
        """Every competitor keeps buffers of its own, so that none warms another's."""
        smallest = min(case.kv_bytes for case in self.cases()) // 4  # in 4 bits
        caches = self.working_set // max(1, smallest)
        if caches > MOST_CACHES:
            raise InputError(
                f"--working-set {self.working_set} would be {caches:,} caches; expected at most "
                f"{MOST_CACHES:,}",
                "a longer --context, or a smaller --working-set",
            )
        largest = max(case.kv_bytes for case in self.cases())
        # One set for PyTorch's peers and one per cache dtype, and float32 rows for the gate.
        caches = len(self.dtypes) * len(self.parts)
        sets = max(self.working_set, largest) * (1 + caches) + 2 * largest
        check_memory(sets, "a smaller --working-set, --context or --batch needs less")


def dtype_of(dtype: str) -> str | tuple[str, str]:
    """As ``KVCache`` takes it.

    >>> dtype_of("int8/int4")
    ('int8', 'int4')
    """
    keys, _, values = dtype.partition("/")
    return (keys, values) if values else keys


def check_cases(count: int) -> None:
    """Refuse more combinations than anyone waits for.

    Raises:
        InputError: with their number.
    """
    if count > MOST_CASES:
        raise InputError(
            f"the lists make {count:,} cases; expected at most {MOST_CASES:,}",
            "shorten a comma list",
        )
