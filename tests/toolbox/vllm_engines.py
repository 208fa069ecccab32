"""vLLM's engine in this process, over tiny models of every family that it knows."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.toolbox import tiny
from tests.toolbox.vllm_cases import OURS

LENGTH = 256  # of the longest text
#: Heads of 32, the smallest that vLLM's own backend takes.
SIZES: dict[str, Any] = {"hidden_size": 192, "max_position_embeddings": LENGTH}
WIDE: dict[str, Any] = {"hidden_size": 48, "head_dim": 32, "max_position_embeddings": LENGTH}
MHA = {"num_key_value_heads": 6}
GPT2: dict[str, Any] = tiny.GPT2 | {"n_embd": 192, "n_positions": LENGTH}
_MOE: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64}
_GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [64] * 4,
    "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": tiny.VOCABULARY,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        case: (model_type, config | (WIDE if "head_dim" in config else SIZES))
        for case, (model_type, config) in tiny.CASES.items()
    },
    "llama-odd": ("llama", tiny.CASES["llama-odd"][1] | SIZES | {"hidden_size": 288}),
    "stablelm": ("stablelm", tiny.CASES["stablelm"][1] | SIZES),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 16}),
    "gpt_neox": ("gpt_neox", tiny.COMMON | SIZES | MHA),
    "opt": ("opt", tiny.UNFOLDABLE["opt"] | SIZES | MHA | {"word_embed_proj_dim": 192}),
    "falcon": ("falcon", tiny.UNFOLDABLE["falcon"] | SIZES),
    "falcon-alibi": ("falcon", tiny.UNFOLDABLE["falcon"] | SIZES | {"alibi": True}),
    "bloom": ("bloom", tiny.COMMON | SIZES | MHA | {"n_layer": 2, "n_head": 6}),
    "cohere2": ("cohere2", tiny.COMMON | WIDE | {"sliding_window": 16}),
    "qwen2_moe": ("qwen2_moe", tiny.CASES["qwen2_moe"][1] | SIZES | _MOE),
    "qwen3_moe": ("qwen3_moe", tiny.CASES["qwen3_moe"][1] | WIDE | _MOE),
    "gemma3n_text": ("gemma3n_text", tiny.COMMON | WIDE | _GEMMA3N),
    "gpt_oss": ("gpt_oss", tiny.COMMON | WIDE | _GPT_OSS | {"hidden_size": 64}),
}


def tiny_folder(folder: Path, case: str, **changes: Any) -> Path:
    """A checkpoint of one of ``MODELS``."""
    model_type, config = MODELS[case]
    return tiny.save_with_tokenizer(tiny.build(model_type, config | changes), folder / case)


@contextmanager
def engine(
    folder: Path, backend: str | None = OURS, apart: bool = False, **options: Any
) -> Iterator[Any]:
    """vLLM's ``LLM``, gone afterwards.

    Args:
        backend: None for what vLLM takes. apart: in processes of its own, as it is served.
    """
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    given = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": LENGTH, "block_size": 32,
        "kv_cache_memory_bytes": 2**26, "max_num_seqs": 8, "seed": 0, "disable_log_stats": False,
        "enable_prefix_caching": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(apart)))
        llm = None
        try:
            llm = LLM(str(folder), attention_backend=backend, **given | options)
            yield llm
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


def prompts(*lengths: int) -> list[list[int]]:
    return [tiny.tokens(1, n, seed=n)[0].tolist() for n in lengths]


def sampled(
    llm: Any, given: Sequence[list[int]], tokens: int = 32, **options: Any
) -> list[list[list[int]]]:
    """The tokens that follow each prompt, as often as ``n`` says."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, **options)
    found = llm.generate([{"prompt_token_ids": x} for x in given], asked, use_tqdm=False)
    return [[list(out.token_ids) for out in request.outputs] for request in found]


def greedy(llm: Any, given: Sequence[list[int]], tokens: int = 32) -> list[list[int]]:
    """The likeliest tokens that follow each prompt."""
    return [out[0] for out in sampled(llm, given, tokens, temperature=0.0)]


def counted(llm: Any, name: str) -> float:
    """What the engine counted by one of its metrics."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def backends_of(llm: Any) -> set[str]:
    """The names of the backends of its attention layers."""
    config = llm.llm_engine.vllm_config.compilation_config
    layers = config.static_forward_context.values()
    return {x.attn_backend.get_name() for x in layers if hasattr(x, "attn_backend")}
