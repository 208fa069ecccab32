"""CTranslate2: converts Hugging Face folders with its own converter, which needs transformers."""

from collections.abc import Callable
from pathlib import Path

from verify_task import AbsentError, Answer, Stage, Task, installed


def version(task: Task) -> str:
    """CTranslate2's version."""
    return installed("ctranslate2", "ctranslate2")


def load(task: Task, stage: Stage) -> tuple[Callable[[], Answer], str]:
    """A generator over the converted folder, which computes in the task's dtype."""
    try:
        import transformers
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        raise AbsentError("its converter needs transformers and torch beside it") from error
    import ctranslate2

    stage("converting")
    out = str(Path(task.work) / "ctranslate2")
    TransformersConverter(task.folder).convert(out, quantization=task.dtype)
    stage("loading")
    device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    engine = ctranslate2.Generator(out, device=device, compute_type=task.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.folder)

    def generate() -> Answer:
        found = engine.generate_batch(
            [tokenizer.convert_ids_to_tokens(list(prompt)) for prompt in task.prompts],
            max_length=task.tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [each.sequences_ids[0] for each in found]

    return generate, "ct2-transformers-converter"
