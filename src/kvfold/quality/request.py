"""What an evaluation is asked to do, checked value by value. No torch."""

from dataclasses import dataclass

from kvfold.arguments import text
from kvfold.errors import InputError
from kvfold.names import shown
from kvfold.numbers import BUDGET, EVAL_WINDOW, KL, LIMIT, NEEDLE, RATIO, TOKENS, Wholes
from kvfold.requests import DEVICE, Choice, Listed, Model, Place, Request, Several, Text, option

DTYPES = ("float32", "bfloat16", "float16")


def _task(value: object, name: str) -> str:
    found = text(value, name).strip()
    if not found or "," in found:
        raise InputError(f"{name} {shown(found)}: expected a task's name", "for instance lambada")
    return found


@dataclass(frozen=True)
class EvalRequest(Request):
    """Checkpoints, the first of which is the reference, and what to measure of them.

    Attributes:
        lengths: of texts to hide pass keys in, in tokens. selects: shares of their pages that
            caches read when they are asked. evicts: shares of the tokens that caches keep.
        tasks: of lm-evaluation-harness; limit: examples of each.
        task_folder: has tasks of the user's own.
        context: tokens per window. max_tokens: at most so many per text, spread over it.
        max_kl, max_ppl_ratio: what is not to be exceeded, on any text.
        dtype: for all models alike.

    Raises:
        InputError: naming the option and what it expects.
    """

    command = "eval"

    source: str = option("SRC", Model())
    others: tuple[str, ...] = option("OUT", Several(Model()), (), metavar="[OUT]...")
    texts: tuple[str, ...] = option("--text", Several(Place()), (), "UTF-8 file; repeatable.")
    lengths: tuple[int, ...] | None = option(
        "--needle", Wholes(NEEDLE), None, "Ask for pass keys in texts of N tokens."
    )
    selects: tuple[float, ...] = option(
        "--select",
        Listed(BUDGET, none=True),
        (),
        "Also with caches that read such a share of their pages; of --needle.",
        metavar="SHARE,...",
    )
    evicts: tuple[float, ...] = option(
        "--evict",
        Listed(BUDGET, none=True),
        (),
        "Also with caches that keep such a share of their tokens; of --needle.",
        metavar="SHARE,...",
    )
    tasks: tuple[str, ...] | None = option(
        "--tasks", Listed(Text(_task)), None, "Tasks of lm-evaluation-harness.", metavar="TASK,..."
    )
    task_folder: str | None = option(
        "--task-folder",
        Place(),
        None,
        "A folder of tasks of your own (YAML files of the harness) for --tasks.",
        metavar="FOLDER",
    )
    limit: int | None = option("--limit", LIMIT, None, "Examples of each task, to try it.")
    context: int = option("--context", EVAL_WINDOW, 512, "Tokens per window.")
    max_tokens: int | None = option(
        "--max-tokens", TOKENS, None, "At most so many of each text, spread over it."
    )
    max_kl: float | None = option("--max-kl", KL, None, "Exit with 3 if a model's KL is above.")
    max_ppl_ratio: float | None = option(
        "--max-ppl-ratio", RATIO, None, "Exit with 3 if a perplexity ratio is above."
    )
    dtype: str = option("--dtype", Choice(DTYPES), "float32")
    device: str | None = option(
        "--device", DEVICE, None, "torch device.  [default: a GPU if there is one]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.texts and (self.max_kl is not None or self.max_ppl_ratio is not None):
            raise InputError(
                "--max-kl and --max-ppl-ratio are measured on text", "name it with --text"
            )
        for name, shares in (("select", self.selects), ("evict", self.evicts)):
            if shares and not self.lengths:
                raise InputError(
                    f"--{name} is of --needle",
                    f"add it, or try kvfold.{name.title()} in a model's cache",
                )
        for name, value in (("--limit", self.limit), ("--task-folder", self.task_folder)):
            if value is not None and self.tasks is None:
                raise InputError(f"{name} is of --tasks", "leave it out, or name some tasks")
        if not (self.texts or self.lengths or self.tasks):
            raise InputError("no text to evaluate on", "name one or more files with --text")
        if self.max_tokens is not None and self.max_tokens < self.context:
            raise InputError(
                f"--max-tokens {self.max_tokens} is less than one window of {self.context}",
                "raise it",
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """All models, the reference first."""
        return (self.source, *self.others)
