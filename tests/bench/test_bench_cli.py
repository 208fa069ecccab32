"""`kvfold bench`: tables, JSON, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold import fold_model
from kvfold.bench.peers import PEERS, Peer
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.commands import complaint, modules_after

ATTENTION = (
    "bench", "attention", "--heads", 4, "--kv-heads", "4,1", "--head-dim", 32, "--context", "64",
    "--working-set", "64k", "--rounds", 1, "--threads", 1,
)  # fmt: skip
MODEL = ("--context", 24, "--rounds", 1, "--tokens", 1, "--working-set", "64k", "--threads", 1)


def test_attention(kvfold: Kvfold, tmp_path: Path) -> None:
    saved = tmp_path / "rows.jsonl"
    run = kvfold(*ATTENTION, "--json", "--save", saved)
    assert run.code == 0, run.err
    rows: Any = run.json()
    names = ["kvfold bf16", "kvfold int8", "kvfold int4", "sdpa", "sdpa-grouped", "matmul"]
    assert [row["implementation"] for row in rows] == names * 2
    for row in rows:
        assert row["status"] == "ok"
        assert row["error"] <= row["allowed"]
        assert row["seconds"]["median"] > 0
        assert row["floor_fraction"]["median"] > 0
        assert row["cold"] in (False, None)
        assert {"cpu", "threads", "torch", "date"} <= set(row["machine"])
        assert "--kv-heads 4,1" in row["command"]
    assert rows[0]["kv_bytes"] == 2 * 4 * 64 * 32 * 2
    assert [json.loads(line) for line in saved.read_text().splitlines()] == rows

    compared = kvfold("bench", "compare", saved, saved)
    assert compared.code == 0
    assert "1.00×" in compared.out
    found: Any = kvfold("bench", "compare", saved, saved, "--json").json()
    assert {change["verdict"] for change in found["changes"]} == {"same"}


def test_tables_fit_a_terminal(kvfold: Kvfold) -> None:
    options = ("--dtype", "bf16,int4", "--against", "sdpa-grouped")
    table = kvfold(*ATTENTION, *options).out
    assert max(map(len, table.splitlines())) <= 80
    for word in ("kvfold bf16", "sdpa-grouped", "±", "GB/s", "not cold", "thread"):
        assert word in " ".join(table.split())
    markdown = kvfold(*ATTENTION, *options, "--markdown").out
    assert "| 4 | kvfold bf16 |" in markdown


def test_a_wrong_result_fails_the_command(kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "sdpa", Peer("sdpa", "", lambda: lambda q, k, v: q))
    run = kvfold(*ATTENTION, "--dtype", "bf16", "--against", "sdpa")
    assert run.code == 1
    assert "WRONG" in run.out
    assert run.err.splitlines()[-2].startswith("error: 2 of 4 results are wrong")


def test_one_model_as_mha_gqa_and_mqa(kvfold: Kvfold, text_file: Path, tmp_path: Path) -> None:
    """One command for tokens per second, bytes and perplexity."""
    source = tiny.save_with_tokenizer(tiny.make("llama"), tmp_path / "two")
    one = tmp_path / "one"
    kvfold("convert", source, one, "--kv-heads", 1, "--no-calibration")
    save = tmp_path / "rows.jsonl"
    options = ("--mha", "--perplexity", text_file, "--batch", "1,2", "--dtype", "bf16")
    arguments = ("bench", "model", source, one, *MODEL, *options)
    run = kvfold(*arguments, "--save", save)
    assert run.code == 0, run.err
    lines = run.out[run.out.index("One model") :].splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if ": " in line and line.strip()[3:4] == ":"]
    assert shown == ["MHA:", "GQA:", "MQA:"]
    rows: Any = [json.loads(line) for line in save.read_text().splitlines()]
    by_sharing = {row["sharing"]: row for row in rows if row["implementation"] == "sdpa"}
    assert list(by_sharing) == ["MHA", "GQA", "MQA"]
    mha, gqa, mqa = by_sharing.values()
    assert [row["case"]["num_kv_heads"] for row in (mha, gqa, mqa)] == [6, 2, 1]
    assert mha["kv_bytes"] == 3 * gqa["kv_bytes"] == 6 * mqa["kv_bytes"]
    # The same function in bfloat16; the folded one is another.
    assert abs(mha["perplexity"] / gqa["perplexity"] - 1) < 2**-7
    assert mqa["perplexity"] != gqa["perplexity"]
    report = kvfold("report", save, "-o", tmp_path / "r.html")
    assert report.code == 0, report.err
    assert "MQA: one" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("case", "words"),
    [("latent", "caches a latent"), ("gpt_neox", "cannot be folded")],
)
def test_what_has_no_heads_to_repeat_is_refused_before_it_is_loaded(
    case: str, words: str, kvfold: Kvfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "latent":
        model = fold_model(tiny.make("llama"), latent="20+4", layout="youtu", fit="none").model
    else:
        model = tiny.build(case, tiny.UNFOLDABLE[case])
    source = tiny.save_with_tokenizer(model, tmp_path / "source")
    monkeypatch.setattr("kvfold.bench.model.load_model", None)  # calling it would fail
    complaint(kvfold("bench", "model", source, *MODEL, "--mha"), words)


def test_models_side_by_side(
    kvfold: Kvfold, llama_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    run = kvfold("bench", "model", llama_folder, *MODEL, "--batch", 2, "--json")
    assert run.code == 0, run.err
    rows: Any = run.json()
    names = ["sdpa", "kvfold bf16", "kvfold int8", "kvfold int4"]
    assert [row["implementation"] for row in rows] == names
    native = rows[0]
    assert native["kv_bytes"] == native["kv_bytes_expected"] == 2 * 24 * 2 * 2 * 6 * 8 * 2
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert row["seconds"]["median"] > 0
        assert row["first_token"]["median"] > 0
    assert rows[2]["kv_bytes_expected"] < native["kv_bytes"]
    options = ("--dtype", "none", "--text", text_file)
    table = kvfold("bench", "model", llama_folder, *MODEL, *options).out
    assert "llama (6:6)" in table
    assert max(map(len, table.splitlines())) <= 100


def test_a_model_that_goes_wrong_has_no_speed(
    kvfold: Kvfold, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvfold.cache.kv import KVCache

    attend: Any = KVCache.attend
    monkeypatch.setattr(KVCache, "attend", lambda self, q, **o: attend(self, q, **o) * 3)
    run = kvfold("bench", "model", llama_folder, *MODEL, "--dtype", "bf16", "--json")
    assert run.code == 1
    rows: Any = run.json()
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert rows[1]["seconds"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-heads", "3"), ("does not divide", "1, 2, 4")),
        (("--kv-heads", "0"), ("at least 1",)),
        (("--kv-heads", ""), ("empty",)),
        (("--context", "0"), ("--context 0", "at least 1")),
        (("--context", "8q"), ("8q", "8k")),
        (("--dtype", "int9"), ("int9", "did you mean int8?")),
        (("--dtype", "int8/int4/int4"), ("keys/values",)),
        (("--against", "sdpq"), ("sdpq", "did you mean sdpa?")),
        (("--against", "none", "--dtype", "none"), ("nothing to measure",)),
        (("--rounds", "0"), ("--rounds 0",)),
        (("--threads", "0"), ("--threads 0",)),
        (("--head-dim", "2k"), ("2k", "1,024")),
        (("--context", "1", "--working-set", "1G"), ("caches", "--working-set")),
        (("--context", "1G"), ("memory", "--working-set")),
        (("--save", "nowhere/rows.jsonl"), ("nowhere",)),
        (("--json", "--markdown"), ("exclude",)),
    ],
)
def test_bad_options(kvfold: Kvfold, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    complaint(kvfold(*ATTENTION, *options), *words)


def test_no_or_a_wrong_subcommand(kvfold: Kvfold) -> None:
    complaint(kvfold("bench"), "Missing command", "--help")
    complaint(kvfold("bench", "atention"), "atention")


def test_bad_models(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    complaint(kvfold("bench", "model", tmp_path / "nowhere"), "nowhere")
    complaint(kvfold("bench", "model", tmp_path), "config.json")
    complaint(kvfold("bench", "model", llama_folder, "--dtype", "int3"), "int3")
    complaint(kvfold("bench", "model", llama_folder, "--text", tmp_path / "no.txt"), "no.txt")
    complaint(kvfold("bench", "model", llama_folder, "--batch", "0"), "--batch 0")


@pytest.mark.parametrize("content", ["", "not json\n", "[1]\n", '{"a": 1}\n', '{"case": 1}\n'])
def test_bad_files(kvfold: Kvfold, tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    complaint(kvfold("bench", "compare", path, path), "bad.jsonl", "--save")
    complaint(kvfold("bench", "compare", tmp_path / "none.jsonl", path), "none.jsonl")


def test_bad_input_is_told_before_torch_is_imported(llama_folder: Path) -> None:
    for arguments in (
        ["attention", "--kv-heads", "3"],
        ["model", str(llama_folder), "--dtype", "int3"],
        ["model", str(llama_folder), "--context", "0"],
        ["compare", "nowhere", "nowhere"],
    ):
        code = f"from kvfold.cli.main import main; assert main({['bench', *arguments]!r}) == 2"
        assert "torch" not in modules_after(code)
