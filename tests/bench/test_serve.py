"""`kvfold bench serve` with an engine whose times are known (`tests/toolbox/fake_vllm.py`)."""

import importlib
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from kvfold.bench.serving.steps import Decoding, Step, first_token, slope
from tests.conftest import Kvfold
from tests.toolbox.commands import complaint, modules_after
from tests.toolbox.fake_vllm import KVFOLD, OWN, PREFILL, STEP, installed

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 99,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
FAST = ("--random-weights", "--rounds", 2, "--working-set", "64k", "--output", 8)
EACH = {"vLLM bf16": OWN, "kvfold bf16": 16 * KVFOLD, "kvfold int8": 8 * KVFOLD,
        "kvfold int4": 4 * KVFOLD}  # fmt: skip


@pytest.fixture(autouse=True)
def _vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed(tmp_path / "site")))
    monkeypatch.setattr("kvfold.bench.serving.request._PROCESS", 1 << 20)  # it is no real vLLM


def model(folder: Path, heads: int, **others: Any) -> Path:
    """A folder with a config alone."""
    folder.mkdir()
    config = SHAPE | {"num_key_value_heads": heads} | others
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def a_step(each: float, context: int, concurrency: int, output: int = 8) -> float:
    """Seconds of the step in the middle of those that decode."""
    return STEP + concurrency * each * (context + output / 2)


@pytest.mark.parametrize("computed", [(), ("--computed",)])
def test_every_number(kvfold: Kvfold, tmp_path: Path, computed: tuple[str, ...]) -> None:
    # Where others are computed meanwhile, requests differ by up to --output tokens in length.
    rel = 8 / (4096 - 512) if computed else 1e-9
    source, folded = model(tmp_path / "source", 4), model(tmp_path / "folded", 1)
    cases = ("--context", "512,4Ki", "--concurrency", "1,3")
    run = kvfold("bench", "serve", source, folded, *cases, *FAST, *computed, "--json")
    assert run.code == 0, run.err
    rows: Any = run.json()
    assert [row["implementation"] for row in rows] == [*EACH] * 8
    assert [row["case"]["model"] for row in rows] == [*["source"] * 4, *["folded"] * 4] * 4
    assert [(row["case"]["batch"], row["case"]["context"]) for row in rows[::8]] == [
        (1, 512), (1, 4096), (3, 512), (3, 4096),
    ]  # fmt: skip
    for row in rows:
        context, batch = row["case"]["context"], row["case"]["batch"]
        each = EACH[row["implementation"]]
        seconds = a_step(each, context, batch)
        assert row["status"] == "ok"
        assert row["running"] == batch
        assert row["seconds"]["median"] == pytest.approx(seconds, rel)
        assert row["tokens_per_second"]["median"] == pytest.approx(batch / seconds, rel)
        assert row["slope"]["median"] == pytest.approx(each, rel)
        ratio = a_step(OWN, context, batch) / seconds
        assert row["vs_best_peer"]["median"] == pytest.approx(ratio, rel)
        assert row["vs_first"]["median"] == pytest.approx(1)
        chunks = -(-context // 2048)
        assert row["first_token"]["median"] == pytest.approx(chunks * STEP + context * PREFILL)
        assert row["prefill_vs_peer"]["median"] == pytest.approx(1)
        assert row["top1"] == 1
        assert len(row["seconds"]["samples"]) == 2
        assert row["machine"]["vllm"] == "0.0"
        assert row["machine"]["threads"] == 3
        assert "--concurrency 1,3" in row["command"]
    holds = {(row["case"]["model"], row["implementation"]): row["cache_tokens"] for row in rows}
    for name in EACH:
        assert holds["folded", name] == pytest.approx(4 * holds["source", name], abs=4)
    assert holds["source", "kvfold int4"] == pytest.approx(4 * holds["source", "vLLM bf16"], abs=4)


def test_equal_memory_holds_more_of_a_folded_model(kvfold: Kvfold, tmp_path: Path) -> None:
    source, folded = model(tmp_path / "source", 4), model(tmp_path / "folded", 1)
    one = 2 * 2 * 4 * 8 * 2 * 640  # bytes of 640 tokens of the source: 2 layers, K and V, 4 heads
    options = ("--context", 512, "--concurrency", 8, "--cache", "bf16", "--memory", 2 * one)
    run = kvfold("bench", "serve", source, folded, *options, *FAST, "--json")
    assert run.code == 0, run.err
    rows: Any = run.json()
    assert [row["running"] for row in rows] == [2, 2, 8, 8]
    ours = EACH["kvfold bf16"]
    more = (8 / a_step(ours, 512, 8)) / (2 / a_step(ours, 512, 2))
    assert rows[3]["vs_first"]["median"] == pytest.approx(more)
    table = kvfold("bench", "serve", source, folded, *options, *FAST)
    assert "(by 2)" in table.out


def test_tables_fit_a_terminal_and_rows_can_be_compared(kvfold: Kvfold, tmp_path: Path) -> None:
    source, saved = model(tmp_path / "source", 4), tmp_path / "rows.jsonl"
    run = kvfold("bench", "serve", source, *FAST, "--save", saved)
    assert run.code == 0, run.err
    assert max(map(len, run.out.splitlines())) <= 80
    for word in ("source (8:4)", "vLLM bf16", "kvfold int4", "16 at once", "3 threads"):
        assert word in " ".join(run.out.split())
    markdown = kvfold("bench", "serve", source, *FAST, "--against", "none", "--markdown").out
    assert "| source (8:4) | kvfold bf16 |" in markdown
    assert kvfold("bench", "compare", saved, saved).code == 0


def test_engines_that_are_alone_give_a_sample_for_each_start(
    kvfold: Kvfold, tmp_path: Path
) -> None:
    source = model(tmp_path / "source", 4, starts_differ=True)
    options = ("--context", 512, "--concurrency", 1, "--cache", "bf16", "--starts", 3)
    run = kvfold("bench", "serve", source, *options, *FAST, "--json")
    assert run.code == 0, run.err
    assert (source / "starts.log").read_text().split() == ["begin", "end"] * 6
    rows: Any = run.json()
    assert [row["starts"] for row in rows] == [3, 3]
    # Who comes first changes with each start, so these are their places among all six.
    for row, places in zip(rows, ((1, 4, 5), (2, 3, 6)), strict=True):
        each = EACH[row["implementation"]]
        expected = [a_step(each, 512, 1) + STEP * (place - 1) for place in places]
        assert row["seconds"]["samples"] == pytest.approx(expected)
        assert row["seconds"]["median"] == pytest.approx(expected[1])
        assert row["top1"] == 1
        assert len(row["floor_fraction"]["samples"]) == len(row["first_token"]["samples"]) == 3
    assert "--starts 3" in rows[0]["command"]
    told = kvfold("bench", "serve", source, *options, *FAST).out
    assert "started 3 times" in " ".join(told.split())
    (source / "starts.log").unlink()
    kvfold("bench", "serve", source, *options[:-2], *FAST)
    assert (source / "starts.log").read_text().split()[:2] == ["begin", "begin"]  # in turn


def test_engines_that_are_alone_need_the_memory_of_one(
    kvfold: Kvfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = list[int]()
    monkeypatch.setattr(
        "kvfold.bench.serving.request.check_memory", lambda count, hint: needed.append(count)
    )
    source = model(tmp_path / "source", 4)
    options = ("--context", 512, "--concurrency", 1, "--cache", "bf16", "--working-set", 0x100)
    for starts in ((), ("--starts", 1)):
        kvfold("bench", "serve", source, *options, *FAST[:3], "--output", 2, *starts)
    together, alone = (count - 0x100 for count in needed)
    assert together == 2 * alone


def test_an_engine_that_fails_says_why(kvfold: Kvfold, tmp_path: Path) -> None:
    run = kvfold("bench", "serve", model(tmp_path / "bad", 4, broken=True), *FAST)
    assert run.code == 1
    assert run.err.splitlines() == [
        "error: bad, vLLM bf16: vLLM ended: ValueError: this model is broken",
        "hint: try the same model and options with `vllm serve`, which tells more",
    ]


def python(tmp_path: Path, says: str) -> Path:
    """A program that is taken for a Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("[false, []]", ("there is no vLLM", "pip install")),
        ("[true, []]", ("kvfold is not installed", "plugin")),
        ("hello", ("no Python that runs", "VENV/bin/python")),
    ],
)
def test_a_python_without_vllm(
    kvfold: Kvfold, tmp_path: Path, says: str, words: tuple[str, ...]
) -> None:
    source, other = model(tmp_path / "source", 4), python(tmp_path, says)
    complaint(kvfold("bench", "serve", source, *FAST, "--python", other), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--context", "8Ki"), ("8,192 positions", "8,200")),
        (("--cache", "int3"), ("int3", "did you mean")),
        (("--cache", "fp16"), ("--cache fp16 with --dtype bfloat16", "--cache bf16")),
        (("--dtype", "bf16"), ("--dtype",)),
        (("--against", "sglang"), ("sglang", "vllm")),
        (("--concurrency", "0"), ("--concurrency 0",)),
        (("--output", "1"), ("--output 1", "at least 2")),
        (("--requests", "0"), ("--requests 0",)),
        (("--starts", "0"), ("--starts 0",)),
        (("--memory", "64k"), ("--memory 64000", "4,104 tokens")),
        (("--memory", "1000G"), ("GiB of memory", "--memory")),
        (("--python", "nowhere/python"), ("nowhere/python", "no Python")),
    ],
)
def test_bad_options(
    kvfold: Kvfold, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    source = model(tmp_path / "source", 4)
    complaint(kvfold("bench", "serve", source, *FAST, *options), *words)


def test_bad_models(kvfold: Kvfold, tmp_path: Path) -> None:
    complaint(kvfold("bench", "serve", tmp_path / "nowhere", *FAST), "nowhere", "a folder")
    complaint(kvfold("bench", "serve", tmp_path, *FAST), "config.json")
    complaint(kvfold("bench", "serve", model(tmp_path / "empty", 4)), "empty")


def test_bad_input_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    arguments = ["bench", "serve", str(model(tmp_path / "source", 4)), "--context", "9k"]
    code = (
        f"from kvfold.cli.main import main; assert main({[*arguments, '--random-weights']!r}) == 2"
    )
    assert "torch" not in modules_after(code)


def test_only_steps_that_decode_count() -> None:
    mixed = [Step(9.0, 1, 1, 2), Step(5.0, 1, 0, 2)]  # a first token, and one beside a prefill
    pure = [Step(s, 2, 0, 2) for s in (1.0, 2.0, 9.0)]
    alone = [Step(1.0, 1, 0, 1)]
    found = Decoding.of([*mixed, *pure, *alone])
    assert found == Decoding(2.0, 2)
    assert found.tokens_per_second == 1.0
    assert first_token([Step(2.0, 0, 0, 1), Step(1.0, 1, 1, 1)]) == 3.0


def test_a_slope_needs_two_contexts() -> None:
    assert slope([512], [[Decoding(1.0, 1)]]) is None


def test_the_benchmark_fills_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    serving, pages, rows = map(importlib.import_module, ("serving", "pages.serving", "pages.rows"))
    monkeypatch.setattr(serving, "RESULTS", tmp_path / "serving.jsonl")
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    assert pages.serving("SmolLM2") == pages.serving_memory() == rows.NOT_YET
    options = ["--models", "smollm2", "--contexts", "512,1024", "--concurrency", "2"]
    quick = ["--formats", "bf16", "--rounds", "1", "--output", "4"]
    monkeypatch.setattr("sys.argv", ["serving.py", sys.executable, *options, *quick])
    serving.main()
    load, memory = pages.serving("SmolLM2").splitlines(), pages.serving_memory().splitlines()
    assert [line.split(" | ")[1] for line in load[2:6]] == ["vLLM bf16", "kvfold bf16"] * 2
    assert f"{1e6 * OWN:.2f} |" in load[2]
    # Two and seven of 16 requests: 2.5 times the source's 4,100 tokens hold 7.5 of a third.
    assert [line.split(" | ")[4] for line in memory[2:6]] == ["2", "2", "7", "7"]
    assert pages.serving("TinyLlama") == pages.serving_starts() == rows.NOT_YET
    alone = ["--starts", "2", "--parts", "load"]
    monkeypatch.setattr("sys.argv", ["serving.py", sys.executable, *options, *quick, *alone])
    serving.main()
    assert pages.serving("SmolLM2").splitlines() == load
    told = [line.split(" | ")[1:4] for line in pages.serving_starts().splitlines()[2:4]]
    assert told == [["vLLM bf16", "2 × 512", "2"], ["kvfold bf16", "2 × 512", "2"]]
