"""Tasks of lm-evaluation-harness on several models: its numbers, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvfold.errors import InputError, RunError
from kvfold.quality.device import pick_device


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task for one model; ``error`` is its standard error, if there is one."""

    name: str
    task: str
    metric: str
    value: float
    error: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def harness() -> Any:
    """The harness.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            "--tasks needs lm-evaluation-harness, which is not installed",
            "pip install 'kvfold[tasks]'",
        ) from error
    return lm_eval


def run_tasks(
    folders: Sequence[tuple[str, Path]],
    tasks: Sequence[str],
    *,
    own: str | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> list[TaskScore]:
    """Score every model with the harness's own settings.

    Args:
        folders: name and Hugging Face folder of each model. limit: examples of each task.
        own: a folder of further tasks, as YAML files of the harness.

    Raises:
        InputError: without the harness. RunError: if it fails, for instance on a task that is
        unknown or cannot be downloaded.
    """
    lm_eval = harness()
    known = {} if own is None else {"task_manager": _with_tasks_of(own)}
    scores: list[TaskScore] = []
    for name, folder in folders:
        arguments: dict[str, Any] = {
            "pretrained": str(folder), "dtype": dtype, "trust_remote_code": False,
            "device": str(pick_device(device)),  # the harness's own default is a GPU
        }  # fmt: skip
        try:
            found = lm_eval.simple_evaluate(
                model="hf", model_args=arguments, tasks=list(tasks), limit=limit, **known
            )
        except Exception as error:  # the harness fails in many ways: unknown tasks, no network
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"lm-evaluation-harness failed on {name} ({first[:160]})",
                "`lm_eval --tasks list` shows the tasks; they are downloaded when first used",
            ) from error
        scores += _scores(name, found["results"])
    return scores


def _with_tasks_of(folder: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _scores(name: str, results: dict[str, dict[str, Any]]) -> list[TaskScore]:
    """Metrics are keyed ``metric,filter``, their errors ``metric_stderr,filter``."""
    scores = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            number = float(error) if isinstance(error, int | float) else None
            scores.append(TaskScore(name, task, metric, float(value), number))
    return scores
