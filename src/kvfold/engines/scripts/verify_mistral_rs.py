"""mistral.rs: opens Hugging Face folders as they are; takes text, and gives text back."""

import os
from collections.abc import Callable

from verify_task import Answer, Stage, Task, installed

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PACKAGES = ("mistralrs", "mistralrs-cuda", "mistralrs-metal", "mistralrs-mkl")


def version(task: Task) -> str:
    """mistral.rs's version; its builds have several names."""
    return installed("mistralrs", *_PACKAGES)


def load(task: Task, stage: Stage) -> tuple[Callable[[], Answer], str]:
    """A runner whose cache on a CPU has float32 for float32; it would be float16."""
    stage("loading")
    if task.dtype == "float32":
        os.environ["MISTRALRS_CPU_KV_F32"] = "1"
    from mistralrs import CompletionRequest, ModelDType, Runner, Which

    dtype = getattr(ModelDType, _DTYPES[task.dtype])
    runner = Runner(which=Which.Plain(model_id=task.folder, dtype=dtype))

    def generate() -> Answer:
        found = []
        for text in task.texts:
            asked = CompletionRequest(
                prompt=text, model="default", max_tokens=task.tokens, temperature=0.0
            )
            found.append(runner.send_completion_request(asked).choices[0].text)
        return found

    return generate, "as it is"
