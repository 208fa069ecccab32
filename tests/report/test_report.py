"""The report: everything of a run is in it, and it needs nothing else."""

import json
from dataclasses import asdict, fields
from html.parser import HTMLParser
from math import exp
from pathlib import Path
from typing import Any

import pytest

from kvfold import convert, heal
from kvfold.bench.results import Row
from kvfold.bench.timing import Spread, Timing
from kvfold.errors import InputError
from kvfold.quality.scores import Quality
from kvfold.report.figures import decode_times
from kvfold.report.html import write_report
from kvfold.report.page import Section, Table, render
from kvfold.report.tables import print_table
from tests.conftest import Kvfold
from tests.toolbox import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    tiny.save_with_tokenizer(tiny.make("llama", num_key_value_heads=6), root / "source")
    (root / "text.txt").write_text("\n\n".join(tiny.words(300, seed) for seed in range(20)))
    convert(root / "source", root / "folded", 2, calibration=[root / "text.txt"], context=64,
            fit="refit", calibration_tokens=1024)  # fmt: skip
    heal(root / "folded", root / "healed", root / "source", [root / "text.txt"], stages=["kl"],
         tokens=512, context=64, batch_tokens=128, held_out_tokens=128, eval_texts=[])  # fmt: skip
    return root / "healed"


class Page(HTMLParser):
    """Counts tags, and collects what would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            outside = value and not value.startswith("#")
            if name in ("src", "href", "xlink:href") and outside:
                self.fetched.append(str(value))


def test_everything_of_a_run_is_in_one_file(kvfold: Kvfold, healed: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    bench = ROOT / "benchmarks" / "attention.jsonl"
    run = kvfold("report", healed, healed.parent / "folded", bench, "-o", out)
    assert run.code == 0, run.err
    assert run.out.strip() == str(out)
    text = out.read_text()
    page = Page(text)
    assert page.fetched == []
    assert page.tags["h2"] == 4  # folding and healing; folding; benchmark
    assert page.tags["svg"] == 2 * 4 + 2 + 1  # folding; quality and healing; benchmark
    assert "script" not in page.tags
    for words in ("6 → 2", "nats lost", "kvfold heal", "kvfold convert", "Drift", "of floor"):
        assert words in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_a_report_begins_with_its_verdict(healed: Path, tmp_path: Path) -> None:
    """On the last model: bytes of the record, nats of the evaluation, steps of the benchmark."""
    losses = {"a": (0, 0.7, 0.1), "b": (0, 1.2, 0.35)}
    names = ("source", "folded", "healed")
    rows = [score(name, text, lost) for text, each in losses.items()
            for name, lost in zip(names, each, strict=True)]  # fmt: skip
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    steps = [
        step(model, context, implementation, faster)
        for model, context, implementation, faster in (
            ("source", 512, "sdpa", 1.0),
            ("source", 4096, "sdpa", 1.0),
            ("healed", 512, "kvfold int8", 9.0),
            ("healed", 4096, "sdpa", 1.2),
            ("healed", 4096, "kvfold bf16", 1.75),
        )
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in steps))
    runs = [healed.parent / "folded", tmp_path / "eval.json", tmp_path / "steps.jsonl"]
    write_report(runs, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    head = text[: text.index("<h2")]
    assert (
        "healed keeps 25% of its source&#x27;s KV cache, loses 0.10 to 0.35 nats a token on 2 "
        "texts and decodes 1.8 times as fast at 4,096 tokens of context, with kvfold bf16." in head
    )
    assert "a 0.10, b 0.35" in head
    assert f"× {exp(0.1):.2f} to {exp(0.35):.2f}" in head
    order = [text.index(f">{title}") for title in ("Evaluation", "Benchmark", "Folding")]
    assert order == sorted(order)


def test_a_verdict_says_what_was_not_measured(healed: Path, tmp_path: Path) -> None:
    convert(healed.parent / "source", tmp_path / "plain", 2, calibrate=False)
    write_report([tmp_path / "plain"], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "plain keeps 33% of its source&#x27;s KV cache; what it lost was not measured; " in text
    assert "kvfold eval SRC OUT" in text
    assert "kvfold bench model SRC OUT" in text
    for name in ("folded", "healed"):  # which have been measured
        write_report([healed.parent / name], tmp_path / f"{name}.html")
        text = (tmp_path / f"{name}.html").read_text()
        assert f"{name} keeps 33% of its source&#x27;s KV cache and loses " in text
    write_report([ROOT / "benchmarks" / "attention.jsonl"], tmp_path / "b.html")  # of no model
    assert '<p class="verdict">' not in (tmp_path / "b.html").read_text()


def test_more_than_texts_may_have_been_evaluated(tmp_path: Path) -> None:
    rows = [score("source", "a", 0.0), score("folded", "a", 0.5)]
    whole = {"texts": rows, "needles": [], "tasks": []}
    (tmp_path / "eval.json").write_text(json.dumps(whole, indent=2))
    write_report([tmp_path / "eval.json"], tmp_path / "r.html")
    assert "folded keeps 25% " in (tmp_path / "r.html").read_text()
    key = {"tokens": 4096, "depth": 0.5, "nats": 0.25}
    whole["needles"] = [
        {**key, "name": name, "found": found}
        for name, found in (("source", 1.0), ("source, 0.25 read", 0.75), ("source, 0.5 kept", 0.5))
    ]
    for name, texts in (("n", []), ("both", rows)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**whole, "texts": texts}))
        write_report([tmp_path / f"{name}.json"], tmp_path / f"{name}.html")
        page = (tmp_path / f"{name}.html").read_text()
        assert "Pass keys hidden in 4,096 tokens" in page
        assert "75%, 0.25" in page
        assert ("nats lost" in page) == bool(texts)
    for wrong in ("[{}]", '{"texts": 3}', '{"texts": [], "needles": [{}]}', "[", ""):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(InputError, match=r"wrong\.json"):
            write_report([tmp_path / "wrong.json"], tmp_path / "w.html")
    assert not (tmp_path / "w.html").exists()


def score(name: str, text: str, lost: float) -> dict[str, Any]:
    values = dict.fromkeys((each.name for each in fields(Quality)), 1.0)
    tokens, size = 100, 4096 if name == "source" else 1024
    own = {"name": name, "text": text, "nats_lost": float(lost), "tokens": tokens}
    return {**values, **own, "kv_bytes_per_token": size}


def step(model: str, context: int, implementation: str, faster: float) -> Row:
    case = {"model": model, "num_heads": 8, "num_kv_heads": 2, "context": context, "batch": 1}
    return Row(
        "model", case, implementation, seconds=Timing.of([6e-3]), vs_first=Spread.of([faster])
    )


def test_a_model_benchmark_is_drawn_with_its_floor(kvfold: Kvfold, tmp_path: Path) -> None:
    """Reading 3 MB at 1 GB/s takes 3 ms; steps take 6."""
    step = Timing.of([6e-3])
    rows = [
        Row(
            "model",
            {"model": "tiny<b>", "num_heads": 8, "num_kv_heads": 2, "context": c, "batch": 1},
            name,
            kv_bytes=2_000_000,
            bytes=3_000_000,
            bandwidth=1e9,
            seconds=step,
            floor_fraction=Spread.of([0.5]),
            vs_first=Spread.of([1.25]),
            first_token=Timing.of([0.75]),
        )
        for c in (512, 8192)
        for name in ("sdpa", "kvfold bf16")
    ]
    path = tmp_path / "model.jsonl"
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    run = kvfold("report", path, "-o", tmp_path / "r.html")
    assert run.code == 0, run.err
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert (page.tags["svg"], page.tags["table"]) == (1, 1)
    assert "b" not in page.tags
    for words in ("whole model", "floor (16 bit)", "first token, s", "50%", "1.25", "0.75"):
        assert words in text
    floor = decode_times([Row(**{**vars(rows[0]), "bytes": 6_000_000}), *rows[1:]])
    assert floor != decode_times(rows)


def test_the_same_runs_give_the_same_file(kvfold: Kvfold, healed: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        kvfold("report", healed, "-o", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_words_of_a_record_cannot_become_markup() -> None:
    table = Table(["<b>"], [["<script>alert(1)</script>"]], "<i>")
    page = Page(render("<t>", [Section("a & b", [table, "$ rm <x>", "<p>"])]))
    assert not {"script", "b", "i", "t", "x"} & set(page.tags)


def test_bad_input(kvfold: Kvfold, healed: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        run = kvfold("report", *arguments)
        assert run.code == 2, run.out
        assert "hint: " in run.err
        return run.err

    assert "holds no record" in refused(tmp_path, "-o", tmp_path / "r.html")
    (tmp_path / "r.html").write_text("precious")
    assert "exists already" in refused(healed, "-o", tmp_path / "r.html")
    assert "cannot be written" in refused(healed, "-o", tmp_path / "nowhere" / "r.html")
    (tmp_path / "kvfold.json").write_text("[1]")
    assert "expected a JSON object" in refused(tmp_path, "-o", tmp_path / "other.html")
    assert (tmp_path / "r.html").read_text() == "precious"


def test_a_demo_is_reported(kvfold: Kvfold, healed: Path, tmp_path: Path) -> None:
    quality: Any = json.loads((healed / "kvfold.json").read_text())["heal"]["quality"][0]
    demo = tmp_path / "demo"
    demo.mkdir()
    rows = [{"kv_heads": 8, "method": "source", "quality": quality}]
    rows.append({"kv_heads": 8, "method": "latent", "latent": "24+8", "quality": quality})
    (demo / "demo.json").write_text(json.dumps({"rows": rows, "seed": 3}))
    (demo / "demo.svg").write_text('<?xml version="1.0"?><svg width="1"></svg>')
    run = kvfold("report", demo, "-o", tmp_path / "r.html")
    assert run.code == 0, run.err
    text = (tmp_path / "r.html").read_text()
    assert "kvfold demo --seed 3" in text
    assert "source, 8 KV heads" in text
    assert "latent, a latent of 24+8 numbers" in text
    assert "<?xml" not in text


def test_words_in_brackets_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ["what", "how"], [["datasets", "pip install 'kvfold[heal]'"]])
    assert "kvfold[heal]" in capsys.readouterr().out
