"""What healing leaves behind besides weights: its part of ``kvfold.json``, and the model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.checkpoint.records import HEALING, QUALITIES
from kvfold.checkpoint.source import Checkpoint
from kvfold.fold.record import read_record, summary
from kvfold.healing.request import HealRequest
from kvfold.quality.scores import Quality
from kvfold.record import METRICS, RECORD, command_line, versions


def heal_record(
    request: HealRequest,
    folder: Path,
    folded: Checkpoint,
    layers: list[dict[str, Any]],
    kept: dict[str, Any] | None,
    quality: Sequence[Quality],
    run: dict[str, Any],
) -> dict[str, Any]:
    """The folded model's own record with the entry ``heal`` added.

    Args:
        folder: the folded model's. layers: reports of the local stage. kept: how much of what
            training changed; None where nothing decided.
    """
    return _folded_record(folder, folded) | {
        "versions": versions(),
        "heal": {
            "command": command_line(request),
            "request": request.as_dict(),
            "steps": request.steps if "kl" in request.stages else 0,
            "local": {"summary": summary_of_stages(layers), "layers": layers},
            **({} if kept is None else {"kept": kept}),
            "quality": [each.as_dict() for each in quality],
            "run": run,
        },
    }


def read_healing(folder: Path) -> dict[str, Any]:
    """What healing left there, with everything that is said of it."""
    record = read_record(folder)
    name = f"{folder / RECORD}, of healing"
    QUALITIES.check(HEALING.check(record.get("heal"), name)["quality"], f"{name}, quality")
    return record


def summary_of_stages(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean error before and after each stage of the local fit."""
    named = [{"captured_value": 1.0, "captured_key": 1.0, **layer} for layer in layers]
    result: dict[str, Any] = summary(named).get("stages", {})
    return result


def _folded_record(folder: Path, folded: Checkpoint) -> dict[str, Any]:
    if (folder / RECORD).exists():
        return read_record(folder)
    return {"format": 1, "source": {"name": folded.label, "family": folded.family.name}}


def model_card(record: dict[str, Any], request: HealRequest) -> str:
    """A README.md for the healed checkpoint."""
    name = Path(request.teacher).name
    rows = record["heal"]["quality"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {request.teacher}",
        "tags: [kvfold, gqa]",
        "---",
        "",
        f"# {name}, folded to fewer KV heads and healed",
        "",
        f"Made by kvfold {record['versions']['kvfold']}: stages {', '.join(request.stages)}; "
        f"{request.tokens:,} tokens of distillation from `{request.teacher}`.",
        "",
    ]
    share = record["heal"].get("kept", {"share": 1.0})["share"]
    if share != 1.0:
        lines += [f"Of what training changed, {share:.0%} is kept: the best on held-out text.", ""]
    if rows:
        lines.append("| text | model | perplexity | nats lost | KL |")
        lines.append("| --- | --- | ---: | ---: | ---: |")
        lines += [
            f"| {row['text']} | {row['name']} | {row['perplexity']:.3f} | {row['nats_lost']:.3f} "
            f"| {row['kl']:.3f} |"
            for row in rows
        ]
        lines.append("")
    lines += [
        "It loads as any other checkpoint: "
        '`AutoModelForCausalLM.from_pretrained("path/to/this/folder")`.',
        f"Everything about its making is in `{RECORD}`, every step of healing in `{METRICS}`.",
    ]
    return "\n".join(lines) + "\n"
