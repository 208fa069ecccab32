"""``kvfold verify``"""

import click

from kvfold.cli.output import emit
from kvfold.cli.parse import asks
from kvfold.engines.request import VerifyRequest


@click.command("verify")
@asks(VerifyRequest)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(request: VerifyRequest, as_json: bool) -> None:
    """Check that engines give the same greedy tokens for OUT as transformers.

    Each engine runs in a process of its own, with this Python or the one that --python or
    KVFOLD_PYTHON_VLLM (…_LLAMA_CPP, …_LITGPT, …_CTRANSLATE2, …_MISTRAL_RS) names; it needs no
    kvfold there. vllm+kvfold does: it is in vllm's Python, unless KVFOLD_PYTHON_VLLM_KVFOLD or
    --python says otherwise. What has to be converted is converted to a temporary folder, which is
    removed. Exit code 3 if tokens differ, 1 if an engine crashes or none opens OUT.
    """
    from kvfold.cli.progress import progress_bar
    from kvfold.engines.run import check_verified, run_verify

    with progress_bar() as progress:
        found = run_verify(request, progress)

    def show() -> None:
        from kvfold.report.engines import print_verification

        print_verification(found)

    emit(as_json, found.as_dict(), show)
    check_verified(found)
