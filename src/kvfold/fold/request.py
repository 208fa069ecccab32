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
from kvfold.checkpoint.places import check_apart, check_disk, check_older, check_place
from kvfold.checkpoint.pretrained import check_complete
from kvfold.checkpoint.source import Checkpoint, open_checkpoint, peek_config, resolve
from kvfold.checkpoint.writer import (
    MAX_SHARD_BYTES,
    Shard,
    attention_specs,
    carried_files,
    folded_specs,
    plan_shards,
    total_bytes,
)
from kvfold.errors import InputError
from kvfold.fold.methods import AUTO, check_method, methods_for
from kvfold.fold.record import geometry_record
from kvfold.geometry import AttentionGeometry
from kvfold.names import shown
from kvfold.numbers import CALIBRATION, KV_HEADS, SEED, SHARD_BYTES, WINDOW, Real
from kvfold.quality.text import GivenText, builtin_calibration_text, read_given
from kvfold.requests import Choice, Made, Model, Place, Request, Several, Switch, Text, option
from kvfold.version import __version__

FIT_NAMES = ("none", "refit", "local")
DATA_FREE = ("first", "mean", "random")  # the GQA paper's methods look at weights only
LEAST_TOKENS = 1024
_GGUF_BYTES_PER_WEIGHT = 4


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


NO_CALIBRATION = Switch("--no-calibration", None, "calibration text", "Look at the weights only.")


@dataclass(frozen=True)
class ConvertRequest(Request):
    """What was asked for, with every default filled in; two equal requests give equal output.

    Attributes:
        fit: by default ``local`` where there is text to fit on, and ``none`` for the GQA paper's
            data-free methods.
        calibration: text files, none at all for the built-in text; None to use no text.
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
        Text(Latent.spelled),
        None,
        "Or: a latent of RANK numbers and a rotary key of ROTARY for all heads (MLA), for instance "
        "160+32; 160+32/2 keeps every second rotary frequency in place of the highest.",
        metavar="RANK+ROTARY",
    )
    kv_bytes: str | None = option(
        "--kv-bytes",
        Text(_share),
        None,
        "Or: so much of the source's cache, by heads or a latent: whichever keeps more of what "
        "attention puts out on the calibration text.",
        metavar="PERCENT%",
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
        "UTF-8 text file like what the model will read; may be repeated.  "
        "[default: a small built-in text]",
        metavar="TEXT",
        off=NO_CALIBRATION,
    )
    calibration_tokens: int = option("--calibration-tokens", CALIBRATION, 50_000, "Use at most.")
    context: int = option("--context", WINDOW, 512, "Tokens per window.")
    seed: int = option("--seed", SEED, 0)
    max_shard_bytes: int = option(
        "--max-shard-bytes", SHARD_BYTES, MAX_SHARD_BYTES, "Size of each file of weights, at most."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_target()
        data_free = self.method in DATA_FREE
        if data_free and not self.calibration and self.fit in (None, "none"):
            self.fill(calibration=None)
        if not self.fit:
            self.fill(fit="none" if data_free or not self.calibrates else "local")
        if self.fit != "none" and not self.calibrates:
            raise InputError(f"--fit {self.fit} needs calibration text", "drop --no-calibration")

    def _check_target(self) -> None:
        names = {"--kv-heads": self.grouped, "--latent": self.latent, "--kv-bytes": self.kv_bytes}
        asked = [name for name, value in names.items() if value is not None]
        if len(asked) > 1:
            raise InputError(f"{' and '.join(asked)} exclude each other", "keep one")
        if not asked:
            raise InputError("nothing to fold to", "give --kv-heads N, or --latent RANK+ROTARY")
        if self.kv_bytes is not None and self.calibration is None:
            raise InputError("--kv-bytes measures on calibration text", "drop --no-calibration")
        if self.pad is not None and self.latent is None:
            raise InputError("--pad is for latents", "give --latent too, or drop it")
        if self.pad is not None and "/" in self.pad:
            raise InputError(f"--pad {self.pad}: expected two sizes", "for instance 512+64")

    @property
    def target(self) -> Target:
        """What is folded to; not known yet while ``kv_bytes`` is given."""
        if self.grouped is not None:
            return self.grouped
        assert self.latent is not None
        asked = Latent.read(self.latent, "--latent")
        padded = Latent.read(self.pad, "--pad") if self.pad else None
        sizes = None if padded is None else (padded.rank, padded.rotary)
        return replace(asked, layout=self.layout, padded=sizes)

    def settled(self, target: Target) -> "ConvertRequest":
        """The same request for one target."""
        if isinstance(target, Latent):
            return replace(self, kv_bytes=None, latent=target.words)
        assert isinstance(target, Grouped)
        return replace(self, kv_bytes=None, grouped=target)

    @property
    def calibrates(self) -> bool:
        return self.calibration is not None

    @property
    def paths(self) -> list[Path]:
        """What is read, as far as it is named by a path."""
        return [Path(name).expanduser() for name in (self.source, *(self.calibration or ()))]

    def as_dict(self) -> dict[str, Any]:
        """What another run must ask for to go on with this one."""
        source, target, rest = self.source, self.target, dict(vars(self))
        for name in ("source", "grouped", "latent", "kv_bytes", "layout", "pad"):
            del rest[name]
        return {"source": source, **target.as_dict(), **rest, "kvfold": __version__}


@dataclass(frozen=True)
class Preview:
    """What a conversion would do: the answer to ``--dry-run``, and what was read to find out.

    Attributes:
        config: the source's. text: what is calibrated on, if anything.
    """

    request: ConvertRequest
    source: AttentionGeometry
    config: Mapping[str, Any]
    text: GivenText | None
    output_bytes: int
    disk_bytes: int
    free_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "request": self.request.as_dict(),
            "geometry": geometry_record(self.source, self.request.target),
            "output_bytes": self.output_bytes,
            "disk_bytes_needed": self.disk_bytes,
            "disk_bytes_free": self.free_bytes,
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
        geometry = _check_foldable(config, request.target)
        output = changed = transcoded
    else:
        config = peek_config(request.source)
        geometry = _check_foldable(config, request.target)
        folder = resolve(request.source)
        checkpoint = open_checkpoint(folder)
        carried_files(folder)
        check_apart(out, [folder])  # of a hub name, known only now
        transcoded = 0
        shards = plan_shards(folded_specs(checkpoint, request.target), request.max_shard_bytes)
        output = total_bytes(shards)
        changed = _changed_bytes(checkpoint, shards, request)
    text = calibration_text(request)
    hidden = 4 * 4 * request.calibration_tokens * geometry.hidden_size if request.calibrates else 0
    needed = output + changed + transcoded + hidden
    free = check_disk(out, needed)
    methods_for(request.method, request.target)  # last: from here on torch is imported
    if not is_gguf(request.source):
        check_complete(checkpoint)
    return Preview(request, geometry, config, text, output, needed, free)


def _check_foldable(config: Mapping[str, Any], target: Target) -> AttentionGeometry:
    """The geometry of a model of that config, which can be folded to the target."""
    family = family_of(config)
    geometry = family.geometry(config)
    target.geometry(geometry, family, config)
    if not target.is_source(geometry):
        target.config(family, config)
    return geometry


def _changed_bytes(checkpoint: Checkpoint, shards: list[Shard], request: ConvertRequest) -> int:
    """Size of the tensors kept apart until the output is written: attention, fitted MLPs."""
    names = set(attention_specs(checkpoint, request.target))
    if request.fit != "none":
        layers = range(checkpoint.geometry.num_layers)
        mlp = checkpoint.family.mlp_output
        names |= {f"{checkpoint.layer_prefix(layer)}.{mlp}.weight" for layer in layers}
    return sum(spec.nbytes for shard in shards for spec in shard.specs if spec.name in names)


def calibration_text(request: ConvertRequest) -> GivenText | None:
    """The text a request calibrates on; None if it uses none."""
    if request.calibration is None:
        return None
    if not request.calibration:
        return GivenText(builtin_calibration_text(), {})
    return read_given(request.calibration, LEAST_TOKENS)
