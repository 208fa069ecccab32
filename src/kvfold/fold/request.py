"""What a conversion is asked to do, and everything that can be checked before it starts.

No torch: bad input is told in a fraction of a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold import arguments
from kvfold.arch.families import family_of
from kvfold.arch.target import Grouped, Target
from kvfold.arguments import choice, flag, location, several
from kvfold.checkpoint.gguf import is_gguf, summarize
from kvfold.checkpoint.places import check_apart, check_disk, check_older, check_place
from kvfold.checkpoint.pretrained import check_complete
from kvfold.checkpoint.source import Checkpoint, open_checkpoint, peek_config, resolve
from kvfold.checkpoint.writer import (
    MAX_SHARD_BYTES,
    Shard,
    carried_files,
    folded_config,
    folded_shapes,
    folded_specs,
    plan_shards,
    total_bytes,
)
from kvfold.errors import InputError
from kvfold.fold.methods import AUTO, check_method, methods_for
from kvfold.fold.record import geometry_record
from kvfold.geometry import AttentionGeometry
from kvfold.numbers import CALIBRATION, SEED, SHARD_BYTES, WINDOW
from kvfold.quality.text import builtin_calibration_text, read_texts
from kvfold.version import __version__

FIT_NAMES = ("none", "refit", "local")
DATA_FREE = ("first", "mean", "random")  # the GQA paper's methods look at weights only
DEFAULT_CONTEXT = 512
DEFAULT_CALIBRATION_TOKENS = 50_000
LEAST_TOKENS = 1024
_GGUF_BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Request:
    """What was asked for, with every default filled in; two equal requests give equal output."""

    source: str
    target: Target
    method: str
    fit: str
    calibration: tuple[str, ...] | None
    calibration_tokens: int
    context: int
    seed: int
    max_shard_bytes: int

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
        del rest["source"], rest["target"]
        return {"source": source, **target.as_dict(), **rest, "kvfold": __version__}


@dataclass(frozen=True)
class Preview:
    """What a conversion would do: the answer to ``--dry-run``."""

    request: Request
    source: AttentionGeometry
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


def make_request(
    source: str | Path,
    num_kv_heads: int,
    *,
    method: str = AUTO,
    fit: str | None = None,
    calibration: Sequence[str | Path] | None = None,
    calibrate: bool = True,
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS,
    context: int = DEFAULT_CONTEXT,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Request:
    """Fill in defaults and refuse what contradicts itself (no torch)."""
    check_method(method)
    if fit is not None:
        check_fit(fit)
    texts = () if calibration is None else several(calibration, "--calibration", location)
    if texts and not flag(calibrate, "calibrate"):
        raise InputError("calibration text and --no-calibration exclude each other", "drop one")
    data_free = method in DATA_FREE and not texts and fit in (None, "none")
    wants_data = flag(calibrate, "calibrate") and not data_free
    chosen = fit or ("local" if wants_data and method not in DATA_FREE else "none")
    if chosen != "none" and not wants_data:
        raise InputError(f"--fit {chosen} needs calibration text", "drop --no-calibration")
    return Request(
        source=arguments.source(source, "SRC"),
        target=Grouped.asked(num_kv_heads),
        method=method,
        fit=chosen,
        calibration=tuple(str(path) for path in texts) if wants_data else None,
        calibration_tokens=CALIBRATION.check(calibration_tokens, "--calibration-tokens"),
        context=WINDOW.check(context, "--context"),
        seed=SEED.check(seed, "--seed"),
        max_shard_bytes=SHARD_BYTES.check(max_shard_bytes, "max_shard_bytes"),
    )


def check_fit(fit: str) -> None:
    """Refuse an unknown fit.

    Raises:
        InputError: naming those there are.
    """
    choice(fit, "--fit", FIT_NAMES)


def preview(request: Request, out: Path, *, force: bool = False, resume: bool = False) -> Preview:
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
        found = summarize(Path(request.source).expanduser())
        geometry = found.geometry
        transcoded = found.parameters * _GGUF_BYTES_PER_WEIGHT
        output = changed = transcoded
    else:
        config = peek_config(request.source)
        request.target.geometry(family_of(config).geometry(config))
        folder = resolve(request.source)
        checkpoint = open_checkpoint(folder)
        carried_files(folder)
        check_apart(out, [folder])  # of a hub name, known only now
        geometry, transcoded = checkpoint.geometry, 0
        folded_config(checkpoint, request.target)
        shards = plan_shards(folded_specs(checkpoint, request.target), request.max_shard_bytes)
        output = total_bytes(shards)
        changed = _changed_bytes(checkpoint, shards, request)
    request.target.geometry(geometry)
    calibration_text(request)
    hidden = 4 * 4 * request.calibration_tokens * geometry.hidden_size if request.calibrates else 0
    needed = output + changed + transcoded + hidden
    free = check_disk(out, needed)
    methods_for(request.method, request.target)  # last: from here on torch is imported
    if not is_gguf(request.source):
        check_complete(checkpoint)
    return Preview(request, geometry, output, needed, free)


def _changed_bytes(checkpoint: Checkpoint, shards: list[Shard], request: Request) -> int:
    """Size of the tensors kept apart until the output is written: attention, fitted MLPs."""
    names = set(folded_shapes(checkpoint, request.target))
    if request.fit != "none":
        layers = range(checkpoint.geometry.num_layers)
        mlp = checkpoint.family.mlp_output
        names |= {f"{checkpoint.layer_prefix(layer)}.{mlp}.weight" for layer in layers}
    return sum(spec.nbytes for shard in shards for spec in shard.specs if spec.name in names)


def calibration_text(request: Request) -> str | None:
    """The text a request calibrates on; None if it uses none."""
    if request.calibration is None:
        return None
    if not request.calibration:
        return builtin_calibration_text()
    return read_texts(request.calibration, LEAST_TOKENS)


def command_line(request: Request) -> str:
    """The command that repeats a request (to a folder called OUT)."""
    parts = ["kvfold convert", request.source, "OUT", request.target.option]
    parts += [f"--method {request.method}", f"--fit {request.fit}", f"--seed {request.seed}"]
    if request.calibration is None:
        parts.append("--no-calibration")
    else:
        parts += [f"--calibration {path}" for path in request.calibration]
        parts += [f"--calibration-tokens {request.calibration_tokens}"]
        parts += [f"--context {request.context}"]
    return " ".join(parts)
