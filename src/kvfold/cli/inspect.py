"""``kvfold inspect``"""

import click

from kvfold.cli.options import Source
from kvfold.cli.output import emit


@click.command("inspect")
@click.argument("source", metavar="SRC", type=Source())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(source: str, as_json: bool) -> None:
    """Show a checkpoint's geometry, KV cache size and head similarity per layer.

    SRC is a Hugging Face folder, a hub name, or a GGUF file. Similarity is data-free. "raw" is
    the cosine of the K weights as they stand, which is all that averaging can use; "K" and "V"
    say how much of two heads one shared head can keep after alignment (50 % is chance).
    """
    from kvfold.checkpoint.gguf import is_gguf
    from kvfold.checkpoint.source import open_checkpoint
    from kvfold.cli.progress import progress_bar
    from kvfold.fold.inspect import Inspection, inspect
    from kvfold.geometry import AttentionGeometry, LatentGeometry

    if not is_gguf(source):
        open_checkpoint(source)  # bad input is told before torch is imported
    with progress_bar() as progress:
        found = inspect(source, progress=progress)

    def show() -> None:
        _print(found)

    def _print(found: Inspection) -> None:
        from kvfold.report.tables import count, print_table, size

        def kept(g: AttentionGeometry) -> tuple[str, str]:
            if isinstance(g, LatentGeometry):
                return "latent", f"{g.kv_lora_rank}+{g.qk_rope_head_dim} numbers, for all heads"
            return "KV heads", f"{g.num_kv_heads} ({g.kind}, {g.group_size} query heads each)"

        g = found.geometry
        nothing = f"none: it has one {'latent' if g.kind == 'MLA' else ''} already"
        others = ", ".join(map(str, found.kv_heads_to_fold_to)) or " ".join(nothing.split())
        facts = [
            ("family", found.family),
            ("parameters", count(found.parameters)),
            ("layers", str(g.num_layers)),
            ("query heads", str(g.num_heads)),
            kept(g),
            ("head size", str(g.head_dim)),
            ("KV cache per token (16 bit)", size(g.kv_bytes_per_token())),
            ("KV cache at 32,768 tokens", size(32768 * g.kv_bytes_per_token())),
            ("can be folded to", others),
        ]
        print_table(found.source, ["", ""], facts)
        if found.similarity and g.num_kv_heads > 1:
            rows = [
                [str(s.layer), f"{s.raw:.2f}", f"{s.aligned_key:.0%}", f"{s.aligned_value:.0%}"]
                for s in found.similarity
            ]
            print_table(
                "How alike the KV heads are (mean over pairs)",
                ["layer", "raw cosine of K", "K kept by one head", "V kept by one head"],
                rows,
            )

    emit(as_json, found.as_dict(), show)
