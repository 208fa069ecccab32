"""``kvfold methods``"""

from typing import Any

import click

from kvfold.cli.output import emit


@click.command("methods")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """List the folding methods."""
    from kvfold.arch.target import Grouped, Latent
    from kvfold.fold.methods import AUTO, AUTO_SUMMARY, all_methods

    words = {Grouped: "heads", Latent: "latent"}
    every = list(words.values())
    rows: list[dict[str, Any]] = [
        {"name": AUTO, "summary": AUTO_SUMMARY, "makes": every, "regroups": True, "paper": ""}
    ]
    rows += [
        {
            "name": m.name,
            "summary": m.summary,
            "makes": [word for target, word in words.items() if target in m.targets],
            "regroups": m.regroups,
            "paper": m.paper,
        }
        for m in all_methods().values()
    ]

    def shared(row: dict[str, Any]) -> str:
        if "heads" not in row["makes"]:
            return "all"
        return "found" if row["regroups"] else "neighbours"

    def show() -> None:
        from kvfold.report.tables import print_table

        cells = [
            [str(r["name"]), str(r["summary"]), ", ".join(r["makes"]), shared(r)] for r in rows
        ]
        print_table("Folding methods", ["method", "what it does", "makes", "groups"], cells)

    emit(as_json, rows, show)
