"""What a conversion would do, from config, headers and file system, before heavy work."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvfold.arch.families import family_of
from kvfold.arch.target import Grouped, Target
from kvfold.checkpoint.gguf import is_gguf, read_gguf_config, summarize
from kvfold.checkpoint.language import is_wrapped, language_config
from kvfold.checkpoint.places import check_apart, check_disk, check_older, check_place
from kvfold.checkpoint.pretrained import check_complete
from kvfold.checkpoint.source import Checkpoint, open_checkpoint, peek_config, resolve
from kvfold.checkpoint.writer import (
    attention_specs,
    carried_files,
    folded_specs,
    plan_shards,
    total_bytes,
)
from kvfold.errors import InputError, UnsupportedError
from kvfold.fold.candidates import heads_and_latents, latents_of
from kvfold.fold.memory import least_memory
from kvfold.fold.methods import methods_for
from kvfold.fold.record import geometry_record
from kvfold.fold.request import LEAST_TOKENS, ConvertRequest
from kvfold.geometry import AttentionGeometry, divisors
from kvfold.quality.device import check_memory, pick_device
from kvfold.quality.launched import launched_size
from kvfold.quality.text import GivenText, builtin_calibration_text, read_given

_GGUF_BYTES_PER_WEIGHT = 4
_PART_HAS_NO_LATENT = (
    "the model reads more than text, and no format has a latent in such a language model's place"
)


@dataclass(frozen=True)
class Preview:
    """What a conversion would do: the answer to ``--dry-run``, and what was read to find out.

    Attributes:
        targets: what is folded to; several where that is yet to be measured.
        config: the source's. text: what is calibrated on, if anything.
        memory_bytes: what the device needs at least; None without a text, and of a GGUF file.
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
