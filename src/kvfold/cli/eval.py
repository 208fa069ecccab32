"""``kvfold eval``"""

import click

from kvfold.cli.output import emit


@click.command("eval")
@click.argument("source", metavar="SRC")
@click.argument("outs", metavar="[OUT]...", nargs=-1)
@click.option("--text", "texts", multiple=True, required=True, help="UTF-8 file; repeatable.")
@click.option("--context", default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=int, help="At most so many of each text, spread over it.")
@click.option("--max-kl", type=float, help="Exit with 3 if a model's KL is above this.")
@click.option("--max-ppl-ratio", type=float, help="Exit with 3 if a perplexity ratio is above.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
@click.option("--device", help="torch device.  [default: a GPU if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    source: str,
    outs: tuple[str, ...],
    texts: tuple[str, ...],
    context: int,
    max_tokens: int | None,
    max_kl: float | None,
    max_ppl_ratio: float | None,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Compare OUT… with SRC on the same windows of text.

    Perplexity with its standard error; the perplexity ratio to SRC, paired window by window;
    KL(SRC || OUT) per token; how often both agree on the most likely token. Use text that was
    not used for calibration, and some of another kind.
    """
    from kvfold.cli.progress import progress_bar
    from kvfold.quality.run import check_eval, check_thresholds, evaluate
    from kvfold.quality.text import read_texts

    sources = (source, *outs)
    check_eval(sources, texts, context, max_tokens)
    for text in texts:
        read_texts([text], context)
    with progress_bar() as progress:
        results = evaluate(
            sources,
            texts,
            context=context,
            max_tokens=max_tokens,
            dtype=dtype,
            device=device,
            progress=progress,
        )

    def show() -> None:
        from kvfold.report.quality import print_quality

        print_quality(results)

    emit(as_json, [result.as_dict() for result in results], show)
    check_thresholds(results, max_kl, max_ppl_ratio)
