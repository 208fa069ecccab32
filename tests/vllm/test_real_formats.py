"""Formats through vLLM's engine: how many tokens fit, and the quality of kvfold's own cache."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfold.cache.kv import KVCache as LayerCache
from kvfold.transformers import KVCache
from kvfold.vllm.recent import RECENT
from tests.toolbox.vllm_cases import needs_vllm
from tests.toolbox.vllm_engines import counted, engine, prompts, tiny_folder

pytestmark = [pytest.mark.real, needs_vllm]

#: vLLM's names, kvfold's, and how many times more tokens fit than in bfloat16.
FORMATS = {
    "float16": ("fp16", 1.0),
    "bfloat16": ("bf16", 1.0),
    "fp8": ("fp8", 1.9),
    "fp8_per_token_head": ("fp8", 1.9),
    "int8_per_token_head": ("int8", 1.9),
    "int4_per_token_head": ("int4", 3.4),
}
[TEXT] = prompts(200)
SIZES: dict[str, Any] = {
    "hidden_size": 384, "num_attention_heads": 6, "head_dim": 64, "num_key_value_heads": 2,
    "initializer_range": 0.08,
}  # fmt: skip
#: A step for each token, as a prompt in one piece may be attended to before it is stored.
ONE_BY_ONE: dict[str, Any] = {"max_num_batched_tokens": 1, "max_num_seqs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("formats"), "llama", **SIZES)


def by_vllm(llm: Any) -> torch.Tensor:
    """The log-probability of each token after those before it."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    [found] = llm.generate([{"prompt_token_ids": TEXT}], asked, use_tqdm=False)
    each = zip(TEXT[1:], found.prompt_logprobs[1:], strict=True)
    return torch.tensor([entry[token].logprob for token, entry in each])


@cache
def by_kvfold(folder: Path, name: str, recent: int = 0) -> torch.Tensor:
    """The same in transformers, from kvfold's own cache; ``recent`` tokens or more are exact."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="kvfold"
    )
    logits = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        like = partial(LayerCache, exact_first=0, exact_recent=recent)
        patch.setattr("kvfold.transformers.layer.LayerCache", like)
        past = KVCache(model.config, dtype=name)
        for token in TEXT[:-1]:
            logits.append(model(torch.tensor([[token]]), past_key_values=past).logits[0, -1])
    scores = torch.log_softmax(torch.stack(logits).double(), -1)
    return scores.gather(1, torch.tensor(TEXT[1:])[:, None])[:, 0].float()


def size(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("cache_dtype", FORMATS)
def test_quality_is_that_of_kvfolds_own_cache(
    folder: Path, cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine adds to the format's error is rounding: a tenth of it at most."""
    monkeypatch.setattr("kvfold.vllm.backend.Rings", lambda: None)  # no tokens are exact
    with engine(folder, kv_cache_dtype=cache_dtype, **ONE_BY_ONE) as llm:
        found = by_vllm(llm)
    own, exact = by_kvfold(folder, FORMATS[cache_dtype][0]), by_kvfold(folder, "fp32")
    assert size(own - exact) > 0
    assert size(found - own) <= size(own - exact) / 10


def test_recent_tokens_are_exact(folder: Path) -> None:
    """At least as many as a cache keeps that may keep 32 more than it is asked for."""
    with engine(folder, kv_cache_dtype="int4_per_token_head", **ONE_BY_ONE) as llm:
        found = by_vllm(llm)
    exact = by_kvfold(folder, "fp32")
    none, fewer = (size(by_kvfold(folder, "int4", n) - exact) for n in (0, RECENT - 32))
    rounded = by_kvfold(folder, "bf16")
    torch.testing.assert_close(
        found[: RECENT - 1], rounded[: RECENT - 1], atol=5 * size(rounded - exact), rtol=0
    )
    assert size(found - exact) <= fewer < none


@pytest.fixture(scope="module")
def blocks_of_bfloat16(folder: Path) -> int:
    return blocks(folder, "bfloat16")


def blocks(folder: Path, cache_dtype: str) -> int:
    """How many the engine makes in a GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with engine(folder, dtype="bfloat16", kv_cache_dtype=cache_dtype) as llm:
            found: int = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return found


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8_per_token_head", "int4_per_token_head"])
def test_how_many_more_blocks_fit(folder: Path, blocks_of_bfloat16: int, cache_dtype: str) -> None:
    assert blocks(folder, cache_dtype) >= FORMATS[cache_dtype][1] * blocks_of_bfloat16


#: What the engine may do to blocks and requests; see the tests of each for what is exact.
MANAGED: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 37},
    "prefixes": {"enable_prefix_caching": True},
    "preemption": {"num_gpu_blocks_override": 14, "enable_prefix_caching": True},
}


@pytest.mark.parametrize("how", MANAGED)
def test_four_bits_lose_as_much_whatever_the_engine_does(folder: Path, how: str) -> None:
    """Sequences whose recent tokens were another's would be wrong by far more."""
    from vllm import SamplingParams

    given, asked = (
        prompts(100, 70, 40, 5, 64),
        SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, logprobs=0, detokenize=False),
    )
    texts, said = list[list[int]](), list[list[float]]()
    with engine(folder, kv_cache_dtype="int4_per_token_head", **MANAGED[how]) as llm:
        for _ in range(2):
            for request in llm.generate(
                [{"prompt_token_ids": x} for x in given], asked, use_tqdm=False
            ):
                out = request.outputs[0]
                texts.append(request.prompt_token_ids + list(out.token_ids))
                said.append(
                    [x[t].logprob for x, t in zip(out.logprobs, out.token_ids, strict=True)]
                )
        preempted = counted(llm, "num_preemptions") > 0
    assert preempted == ("num_gpu_blocks_override" in MANAGED[how])
    error = size(torch.tensor(said) - exactly(folder, texts, 48))
    assert error <= 1.5 * size(by_kvfold(folder, "int4") - by_kvfold(folder, "fp32"))


def exactly(folder: Path, texts: list[list[int]], last: int) -> torch.Tensor:
    """The log-probabilities of each text's last tokens, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text])
            scores = torch.log_softmax(model(ids).logits[0, :-1], -1)
            found.append(scores.gather(1, ids[0, 1:, None])[-last:, 0])
    return torch.stack(found)
