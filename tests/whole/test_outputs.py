"""What commands write: nothing but the files they were asked for, and nothing that runs."""

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvfold.bench.results import Results, Row, check_save, save
from kvfold.bench.timing import Timing
from kvfold.errors import InputError
from kvfold.files import WriteError
from kvfold.report.healing import plot_healing
from kvfold.report.html import write_report
from tests.conftest import Kvfold
from tests.toolbox.in_the_way import KINDS, in_the_way, largest_file

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(1)>--><b>&\"'"


def rows(**changes: Any) -> list[Row]:
    case = {"context": 512, "batch": 1, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    return [Row("attention", {**case, **changes.pop("case", {})}, name,
                seconds=Timing.of([1e-3]), bytes=10**6, bandwidth=1e9, **changes)
            for name in ("sdpa", "kvfold bf16")]  # fmt: skip


def bench_file(path: Path, found: list[Row]) -> Path:
    save(Results("kvfold bench attention", {"date": "2026-11-24"}, tuple(found)), path)
    return path


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return bench_file(tmp_path / "bench.jsonl", rows())


class Page(HTMLParser):
    """What a browser would run or fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.events: list[str] = []
        self.fetched: list[str] = []
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name.startswith("on"):
                self.events.append(name)
            if name in ("src", "href", "xlink:href", "data") and value and value[0] != "#":
                (self.images if value.startswith("data:image/") else self.fetched).append(value)


# -- what is in the way ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["report", "look --png", "look --html", "bench --save"])
def test_only_files_are_replaced_or_added_to(
    command: str,
    kind: str,
    kvfold: Kvfold,
    llama_folder: Path,
    bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told before any work, force or not."""
    monkeypatch.setattr("kvfold.report.html.render", None)  # calling it would fail
    monkeypatch.setattr("kvfold.cli.look._pictures", None)
    monkeypatch.setattr("kvfold.bench.attention.run_attention", None)
    folder = tmp_path / "folder"
    folder.mkdir()
    target = in_the_way(folder, kind)
    before = target.lstat()[:6]
    arguments: list[object] = {
        "report": ["report", bench, "-o", target, "--force"],
        "look --png": ["look", llama_folder, "w3 w4", "--png", target, "--force"],
        "look --html": ["look", llama_folder, "w3 w4", "--html", target, "--force"],
        "bench --save": ["bench", "attention", "--save", target],
    }[command]
    run = kvfold(*arguments)
    assert run.code == 2, run.err
    lines = run.err.splitlines()
    assert [line.split()[0] for line in lines] == ["error:", "hint:"]
    assert "cannot be written: it is a" in lines[0]
    assert target.lstat()[:6] == before
    if kind == "link to a file":
        assert (folder / "aside").read_text() == "precious"


def test_a_planted_link_is_not_followed(kvfold: Kvfold, bench: Path, tmp_path: Path) -> None:
    """The names that files are made under were known beforehand."""
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    for name in ("r.html.tmp", ".r.html.tmp", "r.html~"):
        (tmp_path / name).symlink_to(precious)
    assert kvfold("report", bench, "-o", tmp_path / "r.html").code == 0
    assert precious.read_text() == "years of work"
    assert (tmp_path / "r.html.tmp").is_symlink()


def test_a_report_does_not_replace_what_it_is_made_of(
    kvfold: Kvfold, bench: Path, tmp_path: Path
) -> None:
    before = bench.read_bytes()
    run = kvfold("report", bench, "-o", tmp_path / ".." / tmp_path.name / bench.name, "--force")
    assert run.code == 2
    assert "is read for the report" in run.err
    assert bench.read_bytes() == before


def test_two_outputs_of_one_name(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    run = kvfold("look", llama_folder, "--png", tmp_path / "a", "--html", tmp_path / "a")
    assert run.code == 2
    assert "same file" in run.err


# -- full disks ------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_report(bench: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with largest_file(1000), pytest.raises(WriteError, match="disk is full") as error:
        write_report([bench], tmp_path / "r.html")
    assert error.value.exit_code == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", ["--png", "--html"])
def test_a_full_disk_leaves_no_picture(
    option: str, kvfold: Kvfold, llama_folder: Path, tmp_path: Path
) -> None:
    with largest_file(1000):
        run = kvfold("look", llama_folder, "w3 w4 w5", option, tmp_path / "a")
    assert run.code == 1, run.err
    assert "cannot be written: the disk is full\nhint: " in run.err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_plot(tmp_path: Path) -> None:
    points = [{"step": 0, "tokens": 0, "kl held-out": 1.0}, {"step": 1, "tokens": 9, "kl": 1.0}]
    with largest_file(1000), pytest.raises(WriteError):
        plot_healing(points, tmp_path / "healing.png")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_saved_rows_as_they_were(bench: Path) -> None:
    before = bench.read_bytes()
    with largest_file(len(before) + 50), pytest.raises(WriteError, match="disk is full"):
        bench_file(bench, rows())
    assert bench.read_bytes() == before
    check_save(bench)


# -- what benchmarks are added to ------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "dear diary\n",
        "{}\n",
        '{"benchmark": "attention"}\n',
        "[1, 2]\n",
        '{"half": ',
        "\0\0\0",
        json.dumps(asdict(rows()[0])) + "\ndear diary\n",
        "dear diary\n" + json.dumps(asdict(rows()[0])) + "\n",
        json.dumps(asdict(rows()[0])),
    ],
)
def test_rows_are_added_only_to_rows(
    content: str, kvfold: Kvfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfold.bench.attention.run_attention", None)
    path = tmp_path / "notes.txt"
    path.write_text(content)
    run = kvfold("bench", "attention", "--save", path)
    assert run.code == 2
    assert [line.split()[0] for line in run.err.splitlines()] == ["error:", "hint:"]
    assert path.read_text() == content
    with pytest.raises(InputError):
        bench_file(path, rows())
    assert path.read_text() == content


def test_rows_are_added_to_rows_and_to_nothing(bench: Path, tmp_path: Path) -> None:
    bench_file(bench, rows())
    assert len(bench.read_text().splitlines()) == 4
    (tmp_path / "empty").touch()
    bench_file(tmp_path / "empty", rows())
    assert len((tmp_path / "empty").read_text().splitlines()) == 2


# -- nothing that runs -----------------------------------------------------------------------


def test_a_plot_from_elsewhere_is_only_looked_at(kvfold: Kvfold, tmp_path: Path) -> None:
    """demo.svg was put into the page as it stands, scripts and all."""
    demo = tmp_path / "demo"
    demo.mkdir()
    quality = {
        "text": EVIL, "name": EVIL, "tokens": 9, "nll": 1.0, "perplexity": 2.0,
        "perplexity_error": 0.1, "nats_lost": 0.1, "nats_lost_error": 0.1, "ratio": 1.0,
        "ratio_error": 0.1, "kl": 0.1, "kl_error": 0.1, "kl_p95": 0.1, "kl_p99": 0.1,
        "top1": 0.9, "kv_bytes_per_token": 8,
    }  # fmt: skip
    record = [{"kv_heads": 8, "method": EVIL, "quality": quality}]
    (demo / "demo.json").write_text(json.dumps({"rows": record, "seed": 0}))
    evil = f'<svg onload="alert(1)"><script>alert(1)</script><image href="http://x/"/>{EVIL}</svg>'
    (demo / "demo.svg").write_text(evil)
    run = kvfold("report", demo, "-o", tmp_path / "r.html")
    assert run.code == 0, run.err
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "image", "b"}
    assert (page.events, page.fetched) == ([], [])
    assert [image.split(",")[0] for image in page.images] == ["data:image/svg+xml;base64"]
    assert "default-src 'none'" in text


def test_words_of_a_benchmark_cannot_become_markup(kvfold: Kvfold, tmp_path: Path) -> None:
    found = rows(case={EVIL: EVIL})
    model = {**found[0].case, "model": EVIL}
    found.append(Row("model", model, EVIL, seconds=Timing.of([1e-3]), status=EVIL))
    path = bench_file(tmp_path / f"{EVIL.replace('/', '')}.jsonl", found)
    run = kvfold("report", path, "-o", tmp_path / "r.html")
    assert run.code == 0, run.err
    page = Page((tmp_path / "r.html").read_text())
    assert not page.tags & {"script", "iframe", "object", "embed", "b"}
    assert (page.events, page.fetched, page.images) == ([], [], [])


def test_an_endless_plot_is_refused(kvfold: Kvfold, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "demo.json").write_text(json.dumps({"rows": [], "seed": 0}))
    with (demo / "demo.svg").open("wb") as file:
        file.truncate(1 << 33)
    run = kvfold("report", demo, "-o", tmp_path / "r.html")
    assert run.code == 2
    assert "demo.svg is larger than" in run.err
    assert not (tmp_path / "r.html").exists()


def test_no_output_is_written_but_by_the_one_writer() -> None:
    """Nothing in the package opens a file for writing, copies or saves one by other means."""
    ways = (".write_text(", ".write_bytes(", 'open("w', 'open("a', "copyfile(", "shutil.copy",
            "shutil.move", "torch.save(", "json.dump(", ".touch(")  # fmt: skip
    root = Path(__file__).parents[2] / "src" / "kvfold"
    allowed = {"files.py", "build.py"}
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py") if path.name not in allowed
        for line in path.read_text().splitlines()
        if any(way in line for way in ways)
    ]  # fmt: skip
    assert not found
