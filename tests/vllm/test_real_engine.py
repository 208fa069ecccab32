"""What vLLM's engine does with requests and blocks changes no token."""

from pathlib import Path
from typing import Any

import pytest

from tests.toolbox.vllm_cases import OURS, OWN, needs_vllm
from tests.toolbox.vllm_engines import counted, engine, greedy, prompts, sampled, tiny_folder

pytestmark = [pytest.mark.real, needs_vllm]

GIVEN = prompts(100, 70, 40, 5, 64)
TWICE: dict[str, Any] = {"n": 3, "temperature": 0.8, "seed": 1}
Texts = list[list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("engine"), "llama")


@pytest.fixture(scope="module")
def own(folder: Path) -> tuple[Texts, list[Texts]]:
    """By vLLM's own backend: the likeliest tokens, and some that were drawn."""
    with engine(folder, OWN) as llm:
        return greedy(llm, GIVEN), sampled(llm, GIVEN[:2], **TWICE)


def test_parallel_samples_and_requests_that_come_later(
    folder: Path, own: tuple[Texts, list[Texts]]
) -> None:
    with engine(folder) as llm:
        assert sampled(llm, GIVEN[:2], **TWICE) == own[1]
        assert _one_after_another(llm) == own[0]


def _one_after_another(llm: Any) -> Texts:
    """Each prompt is added a few steps after the one before."""
    from vllm import SamplingParams

    asked, core = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True), llm.llm_engine
    waiting, found, step = list(enumerate(GIVEN)), {}, 0
    while waiting or core.has_unfinished_requests():
        if waiting and step % 5 == 0:
            number, tokens = waiting.pop(0)
            core.add_request(str(number), {"prompt_token_ids": tokens}, asked)
        for request in core.step():
            if request.finished:
                found[int(request.request_id.split("-")[0])] = list(request.outputs[0].token_ids)
        step += 1
    return [found[i] for i in range(len(GIVEN))]


def test_prefixes_are_found_again(folder: Path, own: tuple[Texts, list[Texts]]) -> None:
    with engine(folder, enable_prefix_caching=True) as llm:
        assert greedy(llm, GIVEN) == own[0]
        before = counted(llm, "prefix_cache_hits")
        assert greedy(llm, GIVEN) == own[0]
        whole_blocks = sum((len(x) - 1) // 32 * 32 for x in GIVEN)
        assert counted(llm, "prefix_cache_hits") - before == whole_blocks


def test_prompts_come_in_chunks(folder: Path, own: tuple[Texts, list[Texts]]) -> None:
    with engine(folder, max_num_batched_tokens=37, enable_chunked_prefill=True) as llm:
        assert greedy(llm, GIVEN) == own[0]


def test_requests_that_lose_their_blocks_are_computed_again(
    folder: Path, own: tuple[Texts, list[Texts]]
) -> None:
    with engine(folder, num_gpu_blocks_override=11) as llm:
        assert greedy(llm, GIVEN) == own[0]
        assert counted(llm, "num_preemptions") > 0


def test_drafts_are_checked_many_at_once(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama", num_hidden_layers=1, vocab_size=96)
    given = [x[:8] * 8 for x in GIVEN[:3]]
    with engine(folder, OWN) as llm:
        own = greedy(llm, given, 64)
    drafts = {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }  # fmt: skip
    with engine(folder, apart=True, speculative_config=drafts) as llm:
        assert greedy(llm, given, 64) == own
        assert counted(llm, "spec_decode_num_accepted_tokens") > 0


def test_blocks_that_another_engine_wrote(
    folder: Path, own: tuple[Texts, list[Texts]], tmp_path: Path
) -> None:
    """Through a connector; those to a host's memory need a GPU whose memory it is not."""
    options: dict[str, Any] = {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        }
    }  # fmt: skip
    with engine(folder, **options) as llm:
        assert greedy(llm, GIVEN) == own[0]
    assert any(tmp_path.rglob("*.safetensors"))
    with engine(folder, **options) as llm:
        assert greedy(llm, GIVEN) == own[0]
        assert counted(llm, "external_prefix_cache_hits") > 0


def test_two_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    found = {}
    for backend in (OWN, OURS):  # two KV heads, one in each rank
        with engine(folder, backend, apart=True, tensor_parallel_size=2) as llm:
            found[backend] = greedy(llm, GIVEN)
    assert found[OURS] == found[OWN]


def test_compiled(folder: Path, own: tuple[Texts, list[Texts]]) -> None:
    with engine(folder, enforce_eager=False) as llm:
        assert greedy(llm, GIVEN) == own[0]


@pytest.fixture(scope="module", params=["gemma3_text", "mistral"])
def windows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Texts]:
    """A model with windows that blocks fall out of, and what vLLM's own backend makes of it."""
    folder = tiny_folder(tmp_path_factory.mktemp("windows"), request.param)
    with engine(folder, OWN) as llm:
        found = greedy(llm, GIVEN)
    return folder, found


@pytest.mark.parametrize("disabled", [False, True])
def test_managers_of_layers_with_windows(windows: tuple[Path, Texts], disabled: bool) -> None:
    options: dict[str, Any] = {
        "disable_hybrid_kv_cache_manager": disabled,
        "enable_prefix_caching": True,
    }
    with engine(windows[0], **options) as llm:
        assert greedy(llm, GIVEN) == windows[1]
        assert greedy(llm, GIVEN) == windows[1]
        assert counted(llm, "prefix_cache_hits") > 0
