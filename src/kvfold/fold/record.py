"""What a conversion leaves behind besides weights: ``kvfold.json`` and a model card. No torch."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kvfold.arch.target import Target
from kvfold.checkpoint.records import FOLDING, RECORDS
from kvfold.checkpoint.source import Checkpoint
from kvfold.geometry import AttentionGeometry
from kvfold.record import RECORD

BUILTIN_WARNING = (
    "calibrated on the small built-in text only; calibrate on text like your own for better quality"
)


_LARGE_ERROR = 0.1  # of a latent's norm; SmolLM2's layers have a few hundredths


def constant_warnings(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Of latents without biases, whose norm is wrong where inputs have no part in common."""
    errors = [report.get("constant_error") or 0.0 for report in reports]
    bad = [error for error in errors if error > _LARGE_ERROR]
    if not bad:
        return []
    return [
        f"in {len(bad)} of {len(errors)} layers inputs have no part that is the same in all tokens "
        f"(it varies by up to {max(bad):.0%}), so that the latent's norm cannot be undone: use "
        "--layout youtu, which has biases"
    ]


def read_record(folder: Path) -> dict[str, Any]:
    """What a finished run left in its folder."""
    return dict(RECORDS.read(folder / RECORD))


def read_folding(folder: Path) -> dict[str, Any]:
    """What a conversion left there, with everything that is said of one."""
    return dict(FOLDING.check(read_record(folder), str(folder / RECORD)))


def geometry_record(source: AttentionGeometry, target: Target) -> dict[str, Any]:
    """Heads and cache size, before and after."""
    return {
        "num_heads": source.num_heads,
        **target.compared(source),
        "head_dim": source.head_dim,
        "num_layers": source.num_layers,
        "kv_bytes_per_token_16bit": {
            "source": source.kv_bytes_per_token(),
            "folded": target.kv_bytes_per_token(source),
        },
    }


def cached_numbers(geometry: dict[str, Any]) -> tuple[str, str]:
    """What a token leaves in the cache of a layer, before and after, in a few words.

    Args:
        geometry: of a record.
    """
    heads, latent = geometry["num_kv_heads"], geometry.get("latent")
    if latent is None:
        return f"{heads['source']}", f"{heads['folded']}"
    return f"{heads['source']}", f"latent of {latent['rank']}+{latent['rotary']} numbers"


def summary(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over layers: captured energy, and the error before and after each fitting stage."""
    if not reports:
        return {}
    result: dict[str, Any] = {
        "captured_value": fmean(report["captured_value"] for report in reports),
        "captured_key": fmean(report["captured_key"] for report in reports),
    }
    gains: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        for stage in report["stages"]:
            gains.setdefault(stage["stage"], []).append(stage)
    result["stages"] = {
        name: {
            "error_before": fmean(gain["error_before"] for gain in found),
            "error_after": fmean(gain["error_after"] for gain in found),
        }
        for name, found in gains.items()
    }
    return result


def model_card(checkpoint: Checkpoint, target: Target, record: dict[str, Any]) -> str:
    """A README.md for the folded checkpoint."""
    before, after = cached_numbers(record["geometry"])
    latent = record["geometry"].get("latent")
    cache = record["geometry"]["kv_bytes_per_token_16bit"]
    name = record["source"]["name"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {name}",
        f"tags: [kvfold, {'mla' if latent else 'gqa'}]",
        "---",
        "",
        f"# {name.rstrip('/').split('/')[-1]}, folded to {target.label}",
        "",
        f"Made by kvfold {record['versions']['kvfold']} from "
        f"`{name}`, which has {before} KV heads.",
        "",
        "| | source | this model |",
        "| --- | ---: | ---: |",
        f"| KV heads (of {record['geometry']['num_heads']} query heads) | {before} | {after} |",
        f"| KV cache, bytes per token (16 bit) | {cache['source']:,} | {cache['folded']:,} |",
        "",
        f"Method `{record['method']}`, fit `{record['fit']}`, seed {record['seed']}. "
        "Folding loses quality; measure what it kept on your own text:",
        "",
        "```",
        f"kvfold eval {name} . --text your-text.txt",
        "```",
        "",
        "It loads as any other checkpoint: "
        '`AutoModelForCausalLM.from_pretrained("path/to/this/folder")`.',
        f"Everything about its making is in `{RECORD}`.",
    ]
    if checkpoint.family.normalises(checkpoint.config):
        lines += ["", "This architecture normalises its keys (QK-norm), and no norm sees all that "
                  "those of the members saw: heal it by distillation."]  # fmt: skip
    for warning in record["warnings"]:
        lines += ["", f"> Warning: {warning}."]
    return "\n".join(lines) + "\n"
