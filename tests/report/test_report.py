"""The report: everything of a run is in it, and it needs nothing else."""

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvfold import convert, heal
from kvfold.bench.results import Row
from kvfold.bench.timing import Spread, Timing
from kvfold.report.figures import decode_times
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
    assert page.tags["svg"] == 2 * 4 + 1 + 1
    assert "script" not in page.tags
    for words in ("6 → 2", "nats lost", "kvfold heal", "kvfold convert", "Drift", "of floor"):
        assert words in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


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
