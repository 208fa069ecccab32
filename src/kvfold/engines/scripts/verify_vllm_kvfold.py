"""vLLM with kvfold's attention, where both are installed."""

from collections.abc import Callable

import verify_vllm
from verify_task import Answer, Stage, Task, installed


def version(task: Task) -> str:
    """Of both."""
    return f"{verify_vllm.version(task)}, kvfold {installed('kvfold', 'kvfold')}"


def load(task: Task, stage: Stage) -> tuple[Callable[[], Answer], str]:
    """As vLLM alone, with the backend that kvfold's plugin brings."""
    return verify_vllm.load(task, stage, attention="KVFOLD")
