"""``kvfold families``"""

import click

from kvfold.cli.output import emit

_INSIDE = (
    "Such a language model is folded inside a model that also sees (gemma3, mistral3,\n"
    "llava, internvl, qwen2_5_vl, qwen3_vl, smolvlm …): all else of it passes through as it is."
)


@click.command("families")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """List the architectures that can be folded, and why others cannot."""
    from kvfold.arch.families import FAMILIES, REFUSALS
    from kvfold.arch.latent_config import why_no_latent

    document = {
        "supported": [
            {"model_types": f.model_types, "notes": f.notes, "no_latent": why_no_latent(f)}
            for f in FAMILIES
        ],
        "refused": [{"model_type": name, "reason": why} for name, (why, _) in REFUSALS.items()],
    }

    def show() -> None:
        from kvfold.report.tables import print_table

        supported = [
            [", ".join(f.model_types), f.notes, "no" if why_no_latent(f) else "yes"]
            for f in FAMILIES
        ]
        print_table("Can be folded", ["model_type", "notes", "to a latent"], supported)
        click.echo(_INSIDE)
        refused = [[name, why] for name, (why, _) in REFUSALS.items()]
        print_table("Cannot be folded", ["model_type", "why"], refused)

    emit(as_json, document, show)
