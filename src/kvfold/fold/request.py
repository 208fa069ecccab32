"""What a conversion is asked to do, and everything that can be checked before it starts.

No torch: bad input is told in a fraction of a second.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvfold.arch.latent import LAYOUTS
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.arguments import choice, text
from kvfold.checkpoint.writer import (
    MAX_SHARD_BYTES,
)
from kvfold.errors import InputError
from kvfold.fold.methods import AUTO, check_method
from kvfold.geometry import AttentionGeometry
from kvfold.names import shown
from kvfold.numbers import (
    CALIBRATION,
    FIT_STEPS,
    KL,
    KV_HEADS,
    LATENT_SIZE,
    RATIO,
    SEED,
    SHARD_BYTES,
    WINDOW,
    Real,
)
from kvfold.quality.device import COMPUTED_IN
from kvfold.requests import (
    DEVICE,
    Choice,
    Made,
    Model,
    Place,
    Request,
    Several,
    Switch,
    Text,
    option,
)
from kvfold.version import __version__

FIT_NAMES = ("none", "refit", "local")
DEFAULT_STEPS = 150  # of `local`, in each layer
DATA_FREE = ("first", "mean", "random")  # the GQA paper's methods look at weights only
LEAST_TOKENS = 1024
SELF = "self"  # in place of a text: what the model writes itself (a file of the name: ./self)
# What an open request says of its target.
_OPEN = ("latent", "kv_bytes", "layout", "pad", "max_ppl_ratio", "max_kl")


def _method(value: object, name: str) -> str:
    found = text(value, name)
    check_method(found)
    return found


def _share(value: object, name: str) -> str:
    words = text(value, name).strip()
    number = Real(0, 99, above=True, hint="for instance 50%").read(words.removesuffix("%"), name)
    if not words.endswith("%"):
        raise InputError(f"{name} {shown(words)}: expected percent of the source's", "50%")
    return f"{number:g}%"


def _latent(value: object, name: str) -> str:
    """A latent's two sizes, or how many numbers they are together."""
    words = text(value, name).strip()
    if words.isascii() and words.isdecimal():
        return str(LATENT_SIZE.read(words, name))
    return Latent.spelled(words, name)


NO_CALIBRATION = Switch("--no-calibration", None, "calibration text", "Look at the weights only.")


@dataclass(frozen=True)
class ConvertRequest(Request):
    """What was asked for, with every default filled in; two equal requests give equal output.

    Attributes:
        fit: by default ``local`` where there is text to fit on, and ``none`` for the GQA paper's
            data-free methods.
        fit_steps: of gradient descent on each layer; None where ``fit`` is not ``local``.
        calibration: text files, and ``self`` for text that the model writes itself; none at all
            for the built-in text; None to use no text.
        calibration_tokens: use at most so many, in windows of ``context``.

    Raises:
        InputError: naming the option and what it expects.
    """

    command = "convert"
    makes_folder = True

    source: str = option("SRC", Model())
    grouped: Grouped | None = option(
        "--kv-heads",
        Made(KV_HEADS, Grouped, Grouped, lambda target: target.num_kv_heads),
        None,
        "KV heads to fold to (a divisor).",
        metavar="N",
    )
    latent: str | None = option(
        "--latent",
        Text(_latent),
        None,
        "Or: a latent of RANK numbers and a rotary key of ROTARY for all heads (MLA), for instance "
        "160+32; 160+32/2 keeps every second rotary frequency in place of the highest; 192 lets "
        "the calibration text choose between such of 192 numbers.",
        metavar="RANK+ROTARY",
    )
    kv_bytes: str | None = option(
        "--kv-bytes",
        Text(_share),
        None,
        "Or: so much of the source's cache, by heads or a latent: whichever changes its "
        "predictions on the calibration text less.",
        metavar="PERCENT%",
    )
    max_ppl_ratio: float | None = option(
        "--max-ppl-ratio",
        RATIO,
        None,
        "Or: the fewest KV heads with no higher ratio of perplexities, folded to the source, on "
        "calibration text that is held out.",
    )
    max_kl: float | None = option(
        "--max-kl", KL, None, "The same with a KL; of both, both must hold."
    )
    layout: str = option(
        "--layout",
        Choice(tuple(LAYOUTS)),
        "deepseek_v3",
        "What a latent is stored as: deepseek_v3 opens in transformers and vLLM; portable also in "
        "llama.cpp, with hidden_size² more weights a layer; youtu has biases, which are more "
        "exact, and opens in transformers.",
    )
    pad: str | None = option(
        "--pad",
        Text(Latent.spelled),
        None,
        "Pad the latent with zeros to these sizes, for engines that take no others (vLLM on CPUs: "
        "512+64).",
        metavar="RANK+ROTARY",
    )
    method: str = option("--method", Text(_method), AUTO, "See `kvfold methods`.")
    fit: str = option(
        "--fit",
        Choice(FIT_NAMES),
        None,
        "After folding: solve each layer's output and MLP projections again (refit), or train "
        "its q, k, v, o before that (local).  [default: local; none for mean, first, random]",
    )
    fit_steps: int | None = option(
        "--fit-steps",
        FIT_STEPS,
        None,
        f"Of gradient descent on each layer, with --fit local.  [default: {DEFAULT_STEPS}]",
    )
    calibration: tuple[str, ...] | None = option(
        "--calibration",
        Several(Place()),
        (),
        "UTF-8 text file like what the model will read, or `self` for text that the model writes; "
        "may be repeated.  [default: a small built-in text]",
        metavar="TEXT",
        off=NO_CALIBRATION,
    )
    calibration_tokens: int = option("--calibration-tokens", CALIBRATION, 50_000, "Use at most.")
    context: int = option("--context", WINDOW, 512, "Tokens per window.")
    device: str | None = option(
        "--device", DEVICE, None, "torch device.  [default: a GPU if there is one]"
    )
    dtype: str | None = option(
        "--dtype",
        Choice(COMPUTED_IN),
        None,
        "To multiply in; all else is float32.  [default: bfloat16 where hardware has it]",
    )
    seed: int = option("--seed", SEED, 0)
    max_shard_bytes: int = option(
        "--max-shard-bytes", SHARD_BYTES, MAX_SHARD_BYTES, "Size of each file of weights, at most."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_target()
        data_free = self.method in DATA_FREE and not self.is_open
        if data_free and not self.calibration and self.fit in (None, "none"):
            self.fill(calibration=None)
        if not self.fit:
            self.fill(fit="none" if data_free or not self.calibrates else "local")
        if self.fit != "none" and not self.calibrates:
            raise InputError(f"--fit {self.fit} needs calibration text", "drop --no-calibration")
        if self.fit == "local":
            self.fill_in("fit_steps", lambda: DEFAULT_STEPS)
        elif self.fit_steps is not None:
            raise InputError(f"--fit-steps is of --fit local, not {self.fit}", "drop one of them")

    def _check_target(self) -> None:
        names = {"--kv-heads": self.grouped, "--latent": self.latent, "--kv-bytes": self.kv_bytes}
        asked = [name for name, value in names.items() if value is not None]
        if self.searches:
            asked.append("--max-kl" if self.max_ppl_ratio is None else "--max-ppl-ratio")
        if len(asked) > 1:
            raise InputError(f"{' and '.join(asked)} exclude each other", "keep one")
        if not asked:
            raise InputError("nothing to fold to", "give --kv-heads N, or --latent RANK+ROTARY")
        if self.is_open and self.calibration is None:
            hint = "drop --no-calibration"
            words = f"{asked[0]} {self._room}".strip()
            raise InputError(f"{words} is measured on calibration text", hint)
        if self.pad is not None and self.latent is None:
            raise InputError("--pad is for latents", "give --latent too, or drop it")
        if self.pad is not None and "/" in self.pad:
            raise InputError(f"--pad {self.pad}: expected two sizes", "for instance 512+64")

    @property
    def _room(self) -> str:
        return self.kv_bytes or self.latent or ""

    @property
    def is_open(self) -> bool:
        """Whether what is folded to is yet to be measured."""
        return self.searches or self.kv_bytes is not None or (self.latent or "").isdecimal()

    @property
    def searches(self) -> bool:
        """Whether it is only said what may be lost."""
        return self.max_ppl_ratio is not None or self.max_kl is not None

    @property
    def target(self) -> Target:
        """What is folded to; there is none while the request is open."""
        if self.grouped is not None:
            return self.grouped
        assert self.latent is not None
        asked = Latent.read(self.latent, "--latent")
        return replace(asked, layout=self.layout, padded=self.padded)

    @property
    def padded(self) -> tuple[int, int] | None:
        """The sizes that a latent is padded to."""
        sizes = Latent.read(self.pad, "--pad") if self.pad else None
        return None if sizes is None else (sizes.rank, sizes.rotary)

    def settled(self, target: Target) -> "ConvertRequest":
        """The same request for one target."""
        closed: dict[str, Any] = {"kv_bytes": None, "max_ppl_ratio": None, "max_kl": None}
        if isinstance(target, Latent):
            return replace(self, **closed, latent=target.words)
        assert isinstance(target, Grouped)
        return replace(self, **closed, latent=None, grouped=target)

    def keeps(self, source: AttentionGeometry) -> bool:
        """Whether the source is like this already, so that nothing need be folded."""
        return not self.is_open and self.target.is_source(source)

    @property
    def calibrates(self) -> bool:
        return self.calibration is not None

    @property
    def writes_own(self) -> bool:
        """Whether text that the model writes itself is calibrated on, alone or beside files."""
        return SELF in (self.calibration or ())

    @property
    def files(self) -> tuple[str, ...]:
        """The calibration text that is in files."""
        return tuple(name for name in self.calibration or () if name != SELF)

    @property
    def paths(self) -> list[Path]:
        """What is read, as far as it is named by a path."""
        return [Path(name).expanduser() for name in (self.source, *self.files)]

    def as_dict(self) -> dict[str, Any]:
        """What another run must ask for to go on with this one."""
        rest = dict(vars(self))
        given = {name: rest.pop(name) for name in ("source", "grouped", *_OPEN)}
        target = {name: given[name] for name in _OPEN} if self.is_open else self.target.as_dict()
        return {"source": self.source, **target, **rest, "kvfold": __version__}


def check_fit(fit: str) -> None:
    """Refuse an unknown fit.

    Raises:
        InputError: naming those there are.
    """
    choice(fit, "--fit", FIT_NAMES)
