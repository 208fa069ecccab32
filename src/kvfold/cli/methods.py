"""``kvfold methods``"""

import click

from kvfold.cli.output import emit


@click.command("methods")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """List the folding methods."""
    from kvfold.fold.methods import AUTO, AUTO_SUMMARY, all_methods

    rows = [{"name": AUTO, "summary": AUTO_SUMMARY, "regroups": True, "paper": ""}]
    rows += [
        {"name": m.name, "summary": m.summary, "regroups": m.regroups, "paper": m.paper}
        for m in all_methods().values()
    ]

    def show() -> None:
        from kvfold.report.tables import print_table

        cells = [
            [str(r["name"]), str(r["summary"]), "found" if r["regroups"] else "neighbours"]
            for r in rows
        ]
        print_table("Folding methods", ["method", "what it does", "groups"], cells)

    emit(as_json, rows, show)
