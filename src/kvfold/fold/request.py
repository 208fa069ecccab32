"""What a conversion is asked to do, and everything that can be checked before it starts.

No torch: bad input is told in a fraction of a second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvfold.arch.families import family_of
from kvfold.arch.latent import LAYOUTS
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.arguments import choice, text
from kvfold.checkpoint.gguf import is_gguf, read_gguf_config, summarize
from kvfold.checkpoint.language import is_wrapped, language_config
from kvfold.checkpoint.places import check_apart, check_disk, check_older, check_place
from kvfold.checkpoint.pretrained import check_complete
from kvfold.checkpoint.source import Checkpoint, open_checkpoint, peek_config, resolve
from kvfold.checkpoint.writer import (
    MAX_SHARD_BYTES,
    attention_specs,
    carried_files,
    folded_specs,
    plan_shards,
    total_bytes,
)
from kvfold.errors import InputError, UnsupportedError
from kvfold.fold.candidates import heads_and_latents, latents_of
from kvfold.fold.memory import least_memory
from kvfold.fold.methods import AUTO, check_method, methods_for
from kvfold.fold.record import geometry_record
from kvfold.geometry import AttentionGeometry, divisors
from kvfold.names import shown
from kvfold.numbers import (
    CALIBRATION,
    KL,
    KV_HEADS,
    LATENT_SIZE,
    RATIO,
    SEED,
    SHARD_BYTES,
    WINDOW,
    Real,
)
from kvfold.quality.device import COMPUTED_IN, check_memory, pick_device
from kvfold.quality.launched import launched_size
from kvfold.quality.text import GivenText, builtin_calibration_text, read_given
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
DATA_FREE = ("first", "mean", "random")  # the GQA paper's methods look at weights only
LEAST_TOKENS = 1024
SELF = "self"  # in place of a text: what the model writes itself (a file of the name: ./self)
# What an open request says of its target.
_OPEN = ("latent", "kv_bytes", "layout", "pad", "max_ppl_ratio", "max_kl")
_GGUF_BYTES_PER_WEIGHT = 4
_PART_HAS_NO_LATENT = (
    "the model reads more than text, and no format has a latent in such a language model's place"
)


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


@dataclass(frozen=True)
class Preview:
    """What a conversion would do: the answer to ``--dry-run``, and what was read to find out.

    Attributes:
        targets: what is folded to; several where that is yet to be measured.
        memory_bytes: what the device needs at least; None without a text, and of a GGUF file.
        config: the source's. text: what is calibrated on, if anything.
    """

    request: ConvertRequest
    targets: tuple[Target, ...]
    source: AttentionGeometry
    config: Mapping[str, Any]
    text: GivenText | None
    output_bytes: int
    disk_bytes: int
    free_bytes: int
    memory_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        known = len(self.targets) == 1
        return {
            "request": self.request.as_dict(),
            "targets": [target.label for target in self.targets],
            "geometry": geometry_record(self.source, *self.targets) if known else None,
            "output_bytes": self.output_bytes,
            "disk_bytes_needed": self.disk_bytes,
            "disk_bytes_free": self.free_bytes,
            "memory_bytes_at_least": self.memory_bytes,
        }


def check_fit(fit: str) -> None:
    """Refuse an unknown fit.

    Raises:
        InputError: naming those there are.
    """
    choice(fit, "--fit", FIT_NAMES)


def preview(
    request: ConvertRequest, out: Path, *, force: bool = False, resume: bool = False
) -> Preview:
    """Check everything that config, headers and file system can tell, before heavy work.

    Args:
        resume: whether OUT may be there already: made by a run that was killed just after.

    Raises:
        InputError: with the reason why the conversion cannot run.
    """
    check_apart(out, request.paths)
    check_place(out)
    if not resume:
        check_older(out, force)
    if is_gguf(request.source):
        path = Path(request.source).expanduser()
        transcoded = summarize(path).parameters * _GGUF_BYTES_PER_WEIGHT
        config = read_gguf_config(path)
        targets = _targets(request, config)
        output = changed = transcoded
    else:
        whole = peek_config(request.source)
        config = language_config(whole)
        targets = _targets(request, config, alone=not is_wrapped(whole))
        folder = resolve(request.source)
        checkpoint = open_checkpoint(folder)
        carried_files(folder)
        check_apart(out, [folder])  # of a hub name, known only now
        transcoded = 0
        sizes = [_output_bytes(checkpoint, request, target) for target in targets]
        output, changed = (max(each) for each in zip(*sizes, strict=True))
    geometry = family_of(config).geometry(config)
    text = calibration_text(request)
    hidden = 4 * 4 * request.calibration_tokens * geometry.hidden_size if request.calibrates else 0
    tries = changed if request.searches else 0  # beside the best so far
    needed = output + changed + tries + transcoded + hidden
    free = check_disk(out, needed)
    for target in targets:
        methods_for(request.method, target, request.fit)  # last: from here on torch is imported
    device, memory = pick_device(request.device), None
    if not is_gguf(request.source):
        if request.calibrates:
            has = request.calibration_tokens if text is None else len(text.text.encode())
            memory = least_memory(
                checkpoint,
                tokens=min(request.calibration_tokens, has) // launched_size(),
                context=request.context,
                fitted=request.fit != "none",
            )
            check_memory(
                memory,
                "fewer --calibration-tokens, a smaller --context and --fit none need less",
                str(device),
            )
        check_complete(checkpoint)
    return Preview(request, targets, geometry, config, text, output, needed, free, memory)


def _targets(
    request: ConvertRequest, config: Mapping[str, Any], alone: bool = True
) -> tuple[Target, ...]:
    """What a model of that config may be folded to; all that is asked for, if it can be.

    Args:
        alone: whether it is no part of a larger model, which has no place for a latent.
    """
    family = family_of(config)
    if not alone and request.latent:
        raise UnsupportedError(_PART_HAS_NO_LATENT, "give --kv-heads")
    geometry = family.geometry(config)
    if request.searches:
        targets = tuple(Grouped(heads) for heads in divisors(geometry.num_kv_heads)[:-1])
        if not targets:
            raise InputError(
                f"the source has {geometry.num_kv_heads} KV head: there is none to save",
                "give --latent RANK+ROTARY",
            )
        for each in targets:
            each.geometry(geometry, family, config)
            each.config(family, config)
        return targets
    if request.is_open:
        share, latent = request.kv_bytes, request.latent
        if share is not None:
            part = float(share.removesuffix("%")) / 100
            found = heads_and_latents(family, config, part, request.layout)
            kept = tuple(each for each in found if alone or isinstance(each, Grouped))
            if not kept:
                raise UnsupportedError(_PART_HAS_NO_LATENT, "ask for more, or give --kv-heads")
            return kept
        assert latent is not None
        latents = latents_of(family, config, int(latent), request.layout)
        return tuple(replace(each, padded=request.padded) for each in latents)
    target = request.target
    target.geometry(geometry, family, config)
    if not target.is_source(geometry):
        target.config(family, config)
    return (target,)


def _output_bytes(
    checkpoint: Checkpoint, request: ConvertRequest, target: Target
) -> tuple[int, int]:
    """Of all that is written, and of the tensors kept apart until then: attention, fitted MLPs."""
    specs = folded_specs(checkpoint, target)
    names = set(attention_specs(checkpoint, target))
    if request.fit != "none":
        layers = range(checkpoint.geometry.num_layers)
        mlp = checkpoint.family.mlp_output
        names |= {f"{checkpoint.layer_prefix(layer)}.{mlp}.weight" for layer in layers}
    apart = sum(spec.nbytes for spec in specs if spec.name in names)
    return total_bytes(plan_shards(checkpoint, specs, request.max_shard_bytes)), apart


def calibration_text(request: ConvertRequest) -> GivenText | None:
    """The text that is there for a request to calibrate on; None if it uses none of it."""
    if request.files:
        return read_given(request.files, LEAST_TOKENS)
    if request.calibration is None or request.writes_own:
        return None
    return GivenText(builtin_calibration_text(), {})
