"""Pass keys and tasks."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfold.checkpoint.pretrained import load_tokenizer
from kvfold.demo.text import train_tokenizer
from kvfold.errors import InputError
from kvfold.quality.device import pick_device
from kvfold.quality.needle import DEPTHS, KEYS, prompt, retrieve
from tests.conftest import Kvfold


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["The pass key is 1. The grass is green. Remember it. What is it?"])


@pytest.mark.parametrize("length", [200, 333, 1000])
@pytest.mark.parametrize("depth", DEPTHS)
def test_prompts_have_their_length_and_the_key_at_its_depth(
    tokenizer: Any, length: int, depth: float
) -> None:
    asked, answer = prompt(tokenizer, length, depth, "12345")
    assert len(asked) == length
    text = tokenizer.decode(asked.tolist())
    assert text.endswith("What is the pass key? The pass key is")
    assert tokenizer.decode(answer.tolist()) == " 12345"
    place = text.index("The pass key is 12345") / len(text)
    needle = 60 / len(text) * 3  # the needle's own length, and a sentence's
    assert abs(place - depth) < max(0.12, needle) + (0.2 if depth == 1 else 0)


def test_too_short_a_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="expected at least"):
        prompt(tokenizer, 20, 0.5, "12345")


class Copier(torch.nn.Module):
    """Answers with what followed the last occurrence of the last three tokens: it finds keys."""

    def __init__(self, words: int, blind: bool) -> None:
        super().__init__()
        self.words, self.blind = words, blind
        self.config = SimpleNamespace(max_position_embeddings=2048, vocab_size=words)
        self.device = torch.device("cpu")

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> Any:
        row = ids[0].tolist()
        logits = torch.zeros(1, len(row), self.words)
        for end in range(3, len(row) + 1):
            for start in range(end - 1, 2, -1):
                if row[start - 3 : start] == row[end - 3 : end] and not self.blind:
                    logits[0, end - 1, row[start]] = 20.0
                    break
        return SimpleNamespace(logits=logits)


def test_a_model_that_looks_back_finds_every_key_and_a_blind_one_none(tokenizer: Any) -> None:
    models: Any = [
        ("seeing", Copier(len(tokenizer), False)),
        ("blind", Copier(len(tokenizer), True)),
    ]
    results = retrieve(models, tokenizer, [150])
    assert len(results) == 2 * len(DEPTHS)
    for result in results:
        assert result.found == (result.name == "seeing")
        assert (result.nats < 0.01) == (result.name == "seeing")
    with pytest.raises(InputError, match="longer than the 2048 positions of seeing"):
        retrieve(models, tokenizer, [4096])
    assert KEYS >= 2


def test_needles_from_the_command_line(
    kvfold: Kvfold, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny tokenizer knows no English; a key is five unknown words to it.
    assert load_tokenizer(llama_folder) is not None
    run = kvfold("eval", llama_folder, "--needle", 100)
    assert run.code == 0, run.err
    assert "Pass keys in 100 tokens" in run.out
    as_json: Any = kvfold("eval", llama_folder, "--needle", 100, "--json").json()
    assert len(as_json["needles"]) == len(DEPTHS)
    assert kvfold("eval", llama_folder).code == 2  # neither text nor needle nor task


def test_needles_by_caches_that_select(kvfold: Kvfold, llama_folder: Path) -> None:
    """Texts so short are read as a whole: step by step, the answer has the same nats."""
    select = "--select", "1,0.25"
    run: Any = kvfold("eval", llama_folder, "--needle", 100, *select, "--json").json()
    by_name: dict[str, list[float]] = {}
    for each in run["needles"]:
        by_name.setdefault(each["name"], []).append(each["nats"])
    whole = by_name.pop(str(llama_folder))
    assert list(by_name) == [f"{llama_folder}, {share} read" for share in ("1", "0.25")]
    for nats in by_name.values():
        assert nats == pytest.approx(whole, rel=1e-4)  # float32, in another order
    refused = kvfold("eval", llama_folder, "--text", llama_folder / "config.json", *select)
    assert refused.code == 2
    assert "--select is of --needle" in refused.err


def test_tasks_are_the_harnesss_numbers(
    kvfold: Kvfold, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.append(options)
        if "nonsense" in options["tasks"]:
            raise KeyError("nonsense")
        values = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.5}
        return {"results": {"arc_easy": values}}

    manager = SimpleNamespace(TaskManager=lambda include_path: f"tasks of {include_path}")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", manager)
    fake = SimpleNamespace(simple_evaluate=simple_evaluate)
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    run = kvfold("eval", llama_folder, llama_folder, "--tasks", "arc_easy", "--limit", 5, "--json")
    assert run.code == 0, run.err
    found: Any = run.json()
    assert [(s["metric"], s["value"], s["error"]) for s in found["tasks"]] == 2 * [
        ("acc", 0.25, 0.01), ("acc_norm", 0.5, None),
    ]  # fmt: skip
    assert asked[0]["model_args"]["pretrained"] == str(llama_folder)
    assert asked[0]["model_args"]["device"] == str(pick_device(None))
    assert asked[0]["limit"] == 5
    assert "task_manager" not in asked[0]
    (tmp_path / "own.yaml").write_text("task: own")
    kvfold("eval", llama_folder, "--tasks", "own", "--task-folder", tmp_path)
    assert asked[-1]["task_manager"] == f"tasks of {tmp_path}"
    assert (
        "--task-folder is of --tasks"
        in kvfold("eval", llama_folder, "--needle", 100, "--task-folder", tmp_path).err
    )
    gone = kvfold("eval", llama_folder, "--tasks", "own", "--task-folder", tmp_path / "gone")
    assert gone.code == 2
    assert "holds no task" in gone.err
    failed = kvfold("eval", llama_folder, "--tasks", "nonsense")
    assert failed.code == 1
    assert "lm-evaluation-harness failed" in failed.err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    missing = kvfold("eval", llama_folder, "--tasks", "arc_easy")
    assert missing.code == 2
    assert "kvfold[tasks]" in missing.err


def test_needles_by_caches_that_evict(kvfold: Kvfold, llama_folder: Path) -> None:
    """Asked with the question in the prompt, and after it; what keeps all is as the model."""
    evict = "--evict", "1,0.25"
    run: Any = kvfold("eval", llama_folder, "--needle", 100, *evict, "--json").json()
    ways = {each["name"].partition(", ")[2]: each for each in run["needles"] if not each["depth"]}
    kept = [f"{share} kept{then}" for share in ("1", "0.25") for then in ("", ", then asked")]
    assert set(ways) == {"", *kept}
    for way in kept[:2]:
        assert ways[way]["nats"] == pytest.approx(ways[""]["nats"], rel=0.02)
    refused = kvfold("eval", llama_folder, "--text", llama_folder / "config.json", *evict)
    assert refused.code == 2
    assert "--evict is of --needle" in refused.err
