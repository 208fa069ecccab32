"""What attention can be asked for: declared here once, checked once, and read by every path.

A new option is a line of a ``TypedDict`` below, which says what it is, and a field of
``Visibility`` or ``Scoring``, which carries it. Signatures, documentation, checks, operators'
schemas, the arguments of kernels, and which of them do not know it, follow from these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypedDict, get_type_hints

import torch

from kvfold.errors import InputError
from kvfold.ops.kinds import (
    COUNT,
    FLAG,
    LIMIT,
    MASK,
    NUMBER,
    PER_HEAD,
    PER_SEQUENCE,
    POSITIVE,
    WINDOW,
    Kind,
    Shape,
)

#: What people give: keys up to a query's own, itself included, or keys before and after its own.
Window = int | tuple[int | None, int | None]
_FAR = 1 << 62  # operators take integers of 64 bits


@dataclass(frozen=True)
class Option:
    """The declaration of an option.

    Attributes:
        says: the sentence of the documentation.
        default: what leaving it out means.
    """

    kind: Kind
    says: str
    default: Any = None


class _Keys(TypedDict, total=False):
    causal: Annotated[
        bool,
        Option(
            FLAG,
            "the last query stands at the last key (bottom-right alignment), and sees no later "
            "ones.",
            default=True,
        ),
    ]
    start: Annotated[
        torch.Tensor | None,
        Option(PER_SEQUENCE, "int ``[B]``; keys before ``start[b]`` are padding (on the left)."),
    ]
    mask: Annotated[
        torch.Tensor | None,
        Option(
            MASK,
            "boolean (True: may be seen) or additive (-inf: hidden), broadcastable to "
            "``[B, Hq, T, S]``; ``[S]`` is one for all queries. Keys and values that the options "
            "hide from every query may hold anything, NaN too.",
        ),
    ]


class _Windows(TypedDict, total=False):
    window: Annotated[
        Window | None,
        Option(
            WINDOW,
            "how far a query sees: the last ``window`` keys up to its own position or, as a pair "
            "``(left, right)``, so many keys before and after it (-1 or None: no limit). With "
            "``causal`` none after it: ``window=w`` is ``(w - 1, 0)``.",
        ),
    ]
    sinks: Annotated[
        int, Option(COUNT, "first keys that a window does not hide on the left.", default=0)
    ]


class _Scores(TypedDict, total=False):
    scale: Annotated[float | None, Option(NUMBER, "of the scores, ``D ** -0.5`` by default.")]
    softcap: Annotated[
        float | None,
        Option(
            POSITIVE,
            "scores become ``softcap * tanh(score / softcap)``, before masks and bias.",
        ),
    ]
    alibi_slopes: Annotated[
        torch.Tensor | None,
        Option(
            PER_HEAD,
            "``[Hq]``; a score loses ``slope`` times the distance ``|position - j|``, of later "
            "keys too where they are seen (arXiv 2108.12409).",
        ),
    ]
    sink_logits: Annotated[
        torch.Tensor | None,
        Option(
            PER_HEAD,
            "``[Hq]``, a logit per head that joins the softmax's denominator as a key whose value "
            "is zero would; it is not scaled, capped or hidden (gpt-oss).",
        ),
    ]


class VarlenOptions(_Windows, _Scores):
    """Options of ``attention_varlen``."""


class FixedOptions(_Keys, _Scores):
    """Options of a cache that has its own window."""


class CacheOptions(_Keys, _Windows, _Scores):
    """Options of a cache, which knows how long its sequences are."""


class AttentionOptions(CacheOptions, total=False):
    """Options of ``attention``: all there are."""

    lengths: Annotated[
        torch.Tensor | None,
        Option(
            PER_SEQUENCE,
            "int ``[B]``; keys from ``lengths[b]`` on are padding (on the right), and the last "
            "query stands at position ``lengths[b] - 1``. For a right-padded prefill leave it "
            "out: causal queries never see padding after them.",
        ),
    ]


class Visibility(NamedTuple):
    """Which keys a query sees; None is no limit, no padding, no mask.

    These and ``Scoring`` are tuples, as making frozen dataclasses would take a twentieth of a
    step's fixed cost.

    Attributes:
        left, right: how many keys before and after its own position. Causal is ``right=0``; a
            causal window of w tokens is ``left=w - 1, right=0``.
        sinks: first keys that ``left`` does not hide.
        start, lengths: int ``[B]``, the keys of a sequence. Where they are stored with their
            lengths, as in a cache, the latter are given beside this.
        mask: boolean or additive, broadcastable to ``[B, Hq, T, S]``.
    """

    left: int | None = None
    right: int | None = None
    sinks: int = 0
    start: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether a query sees no later keys than its own."""
        return self.right == 0


class Scoring(NamedTuple):
    """What makes scores of products, and weights of scores; see ``AttentionOptions``."""

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sink_logits: torch.Tensor | None = None


class Options(NamedTuple):
    """All options of a call, checked; ``check_options`` makes them."""

    visibility: Visibility = Visibility()
    scoring: Scoring = Scoring()

    def flat(self) -> tuple[Any, ...]:
        """The value of every field of ``FIELDS``, in this order; see ``unflattened``."""
        return (*self.visibility, *self.scoring)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors among them, by name."""
        if self is _PLAIN:
            return {}
        flat = self.flat()
        return {name: flat[i] for i, name in _TENSORS if flat[i] is not None}

    def beyond(self, known: frozenset[str]) -> list[str]:
        """Names of what was asked for and is not among the fields that somebody knows."""
        if len(known) == len(FIELDS):
            return []
        named = zip(_DEFAULTS.items(), self.flat(), strict=True)
        return [name for (name, none), x in named if x is not none and name not in known]


def declared(options: type) -> dict[str, Option]:
    """The declarations in one of the dictionaries above, by name."""
    hints = get_type_hints(options, include_extras=True)
    return {name: hints[name].__metadata__[0] for name in hints}


class Accepted(NamedTuple):
    """What a public function takes."""

    function: str
    options: dict[str, Option]

    def refuse_others(self, given: Mapping[str, Any]) -> None:
        """As Python does with arguments that a function does not have."""
        for name in given:
            self.option(name)

    def option(self, name: str) -> Option:
        """The declaration of an option that the function has."""
        found = self.options.get(name)
        if found is None:
            raise TypeError(f"{self.function}() got an unexpected keyword argument {name!r}")
        return found


ATTENTION = Accepted("attention", declared(AttentionOptions))
#: Every field of ``Visibility`` and then ``Scoring``, and its kind.
FIELDS: dict[str, Kind] = {
    name: ATTENTION.options[name].kind if name in ATTENTION.options else LIMIT
    for name in (*Visibility._fields, *Scoring._fields)
}
#: They as arguments of a PyTorch operator, ``Options.flat`` by ``Options.flat``.
SCHEMA = ", ".join(f"{kind.schema} {name}" for name, kind in FIELDS.items())
#: Those that do not ask where keys stand, but which are a sequence's and which come later.
PLACELESS = frozenset({"right", "start", "scale", "softcap", "sink_logits"})
_DEFAULTS: dict[str, Any] = {**Visibility._field_defaults, **Scoring._field_defaults}
_TENSORS = [(i, name) for i, (name, kind) in enumerate(FIELDS.items()) if kind.is_tensor]
_PLAIN = Options(Visibility(right=0))


def unflattened(values: Sequence[Any]) -> Options:
    """Options from what ``Options.flat`` gave."""
    sights = len(Visibility._fields)
    return Options(Visibility(*values[:sights]), Scoring(*values[sights:]))


def check_options(
    shape: Shape, given: Mapping[str, Any], accepted: Accepted = ATTENTION
) -> Options:
    """Check the options of a call.

    Raises:
        InputError: for the first that does not fit.
        TypeError: for a name that the function does not take.
    """
    if not given:
        return _PLAIN
    eager = not torch.compiler.is_compiling()
    sights: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    for name, x in given.items():
        option = accepted.options.get(name) or accepted.option(name)
        if x is option.default:  # None, mostly
            continue
        kind = option.kind
        if eager:
            kind.typed(name, x, shape)
        of = scores if name in Scoring._fields else sights
        of[name] = kind.fits(name, x, shape)
    causal, window, left = sights.pop("causal", True), sights.pop("window", None), None
    right = 0 if causal else None
    if window is not None:
        _check_window(window, causal)
        left, right = reach(causal, window)
        if eager:
            left, right = (None if x is None else min(x, _FAR) for x in (left, right))
    scoring = Scoring(**scores) if scores else _PLAIN.scoring
    return Options(Visibility(left, right, **sights), scoring)


def _check_window(window: Window | None, causal: bool) -> None:
    """A number counts back from a query's position; a pair counts on both of its sides."""
    if window is None:
        return
    if not isinstance(window, tuple | list):
        if window < 1:
            raise InputError(f"window={window}: expected at least 1, or None")
        if not causal:
            raise InputError(
                f"window={window} needs causal=True: it counts back from a query's position",
                "window=(left, right) limits what is seen on both sides",
            )
        return
    if len(window) != 2 or any(x is not None and x < -1 for x in window):
        raise InputError(
            f"window={window}: expected (left, right), keys before and after a query's own",
            "0 or more; -1 or None for no limit",
        )
    if causal and (window[1] or 0) > 0:
        raise InputError(
            f"window={window} would show later keys, which causal=True hides",
            "give causal=False, or a window that ends with 0",
        )


def reach(causal: bool, window: Window | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees.

    >>> reach(True, None), reach(True, 3), reach(False, (3, -1))
    ((None, 0), (2, 0), (3, None))
    """
    if window is None:
        left = right = None
    elif isinstance(window, tuple | list):
        left, right = (None if x == -1 else x for x in window)
    else:
        left, right = window - 1, 0
    return left, 0 if causal else right
