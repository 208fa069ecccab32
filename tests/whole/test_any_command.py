"""Wrong input to every option of every command: 0, 2 with a hint, or a clear 1; nothing left.

The commands and options are click's own, so a new one is tested when it is added.
"""

import os
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfold.cli.options import Location, NewFolder, Number, Source
from kvfold.errors import RunError
from tests.conftest import Kvfold, Run
from tests.toolbox import tiny
from tests.toolbox.commands import command_of, commands

LEAVES = [words for words in commands() if not isinstance(command_of(words), click.Group)]
SECONDS = 30  # for what takes one or two here

NUMBERS = [
    "", " ", "nan", "inf", "-inf", "1e999", "9" * 50, "0", "-1", "1", "2", "3", "0.5", "1e-9",
    "1_0", "0x10", "12", "1k", "64", "1M", "1G", "1T", "1Ki", "1KB", "1B",
    "2**63", str(2**63 - 1), str(2**64),
    "1,2", "1,,", ",", ",".join("1" * 9), ",".join(map(str, range(1, 200))), "--help", "True", "½",
]  # fmt: skip
WORDS = [
    "", " ", "none", "all", "local", "kl", "bf16", "int4/int4", "int4/", "/", "a/b/c", ",,",
    "x" * 5000, "$a$", "[/b]", "[red]", "\\", "%s%n{0}", "\x1b[31m", "\n", "\udc80", "cuda",
    "cuda:99", "meta", "cpu", "mps", "here", "list", "h100", "pca", "lambada", "🙂", "--json", "-",
    "--",
]  # fmt: skip
AS_THEY_ARE = ["", ".", "..", "/", "/proc/self/mem", "~nouser/x", "~", "-", "org/model"]
PATHS = [
    *AS_THEY_ARE, "DEVICE", "TEXT", "TEXT/x", "EMPTY", "FOLDER", "FOLDER/new", "MODEL", "FIFO",
    "LINK", "LOOP", "DANGLING", "nowhere/x", "new", "n" * 300, "p/" * 3000, "a\x00b", "na$m$e",
    "_[/b]%\\", "new\nline", "\x1b[31mred", "\udc80\udcff", "x.gguf", "BAD.gguf", "BAD.json",
    "new=2", "TEXT=nan",
]  # fmt: skip


@dataclass
class Place:
    """A folder with things that options can be pointed at."""

    root: Path

    def path(self, word: str) -> str:
        """What a word of PATHS means here."""
        return word if word in AS_THEY_ARE else f"{self.root}/{word}"

    def listing(self) -> dict[str, tuple[int, int, int]]:
        """Everything below, with what would change if it were touched."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in folders + files:
                path = os.path.join(folder, name)  # noqa: PTH118
                status = os.lstat(path)
                size = 0 if name in folders else status.st_size
                found[path] = (status.st_mode, size, 0 if name in folders else status.st_mtime_ns)
        return found


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is copied for every test."""
    root = tmp_path_factory.mktemp("things") / "things"
    model = tiny.make("llama", num_key_value_heads=6)
    tiny.save_with_tokenizer(model, root / "MODEL")
    (root / "TEXT").write_text(tiny.words(3000), encoding="utf-8")
    (root / "EMPTY").write_text("")
    (root / "BAD.gguf").write_bytes(b"GGUF\x03\x00" + b"\xff" * 64)
    (root / "BAD.json").write_text('{"a": [1,')
    (root / "FOLDER").mkdir()
    return root


@pytest.fixture
def place(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    root = tmp_path / "place"
    shutil.copytree(things, root)
    os.mkfifo(root / "FIFO")
    with suppress(PermissionError):  # only root makes devices
        os.mknod(root / "DEVICE", stat.S_IFCHR | 0o666, os.makedev(1, 7))  # /dev/full
    monkeypatch.setenv("HOME", str(tmp_path))
    (root / "LINK").symlink_to("TEXT")
    (root / "LOOP").symlink_to("LOOP")
    (root / "DANGLING").symlink_to("nothing")
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return Place(root)


def _enough(*arguments: Any, **options: Any) -> Any:
    raise RunError("enough: all checks are passed", "none")


@pytest.fixture(autouse=True)
def _no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and timing are other tests' subject; here they end when they begin."""
    monkeypatch.setattr("kvfold.demo.run.train_demo_model", _enough)
    monkeypatch.setattr("kvfold.healing.run._Run.local", _enough)
    monkeypatch.setattr("kvfold.bench.attention.measure", _enough)
    monkeypatch.setattr("kvfold.bench.model._prefill", _enough)
    monkeypatch.setattr("kvfold.engines.run.ask", _enough)
    monkeypatch.setattr("kvfold.bench.serving.run.Engine", _enough)
    monkeypatch.setattr("kvfold.bench.this_machine._ROUNDS", 1)
    monkeypatch.setattr("kvfold.bench.this_machine._BYTES", 1 << 20)
    monkeypatch.setattr("kvfold.bench.this_machine._SIZE", 64)


# What makes a command run at all; every option is added to it.
BASE: dict[str, list[str]] = {
    "demo": ["--out", "@new-demo"],
    "inspect": ["@MODEL"],
    "convert": ["@MODEL", "@new-out", "--kv-heads", "2", "--no-calibration"],
    "heal": ["@MODEL", "@new-out", "--teacher", "@MODEL", "--text", "@TEXT", "--tokens", "2k"],
    "eval": ["@MODEL", "--text", "@TEXT", "--context", "64", "--max-tokens", "128"],
    "plan": ["@MODEL", "--gpu", "h100"],
    "bench attention": ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--context", "16",
                        "--working-set", "1k"],
    "bench model": ["@MODEL", "--context", "16", "--dtype", "none", "--working-set", "1k"],
    "bench serve": ["@MODEL", "--context", "16", "--output", "2", "--working-set", "1k"],
    "bench compare": ["@TEXT", "@TEXT"],
    "verify": ["@MODEL", "--prompt", "w3 w4", "--tokens", "2"],
    "look": ["@MODEL", "w3 w4", "--png", "@new.png"],
    "report": ["@MODEL", "-o", "@new.html"],
}  # fmt: skip


def values_of(parameter: click.Parameter) -> st.SearchStrategy[str]:
    """Values of a parameter's kind, right and wrong, and of other kinds."""
    kind = parameter.type
    if isinstance(kind, Number):
        own, free = NUMBERS, st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
    elif isinstance(kind, Location | NewFolder | Source):
        own, free = [f"@{word}" for word in PATHS], st.text(max_size=300).map("@".__add__)
    elif isinstance(kind, click.Choice):
        own, free = [*kind.choices, *WORDS], st.text(max_size=8)
    else:
        own, free = [*WORDS, *(f"@{word}" for word in PATHS)], st.text(max_size=300)
    anything = st.sampled_from([*NUMBERS, *WORDS, *(f"@{word}" for word in PATHS)])
    return st.sampled_from(own) | free | anything


@st.composite
def command_lines(draw: Any, words: tuple[str, ...], most: int = 2) -> list[str]:
    """The command's base with one or two parameters changed, added, repeated or left out."""
    line = list(BASE.get(" ".join(words), []))
    parameters = [p for p in command_of(words).params if p.name != "help"]
    for parameter in draw(st.lists(st.sampled_from(parameters), min_size=1, max_size=most)):
        if isinstance(parameter, click.Argument):
            places = [i for i, word in enumerate(line) if not word.startswith("-")
                      and not line[i - 1].startswith("-")]  # fmt: skip
            value = draw(values_of(parameter))
            if places and draw(st.booleans()):
                line[draw(st.sampled_from(places))] = value
            else:
                line = [value, *line]
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            line.append(draw(st.sampled_from(parameter.opts)))
        else:
            option = draw(st.sampled_from(parameter.opts))
            value = draw(values_of(parameter))
            line += [f"{option}={value}"] if option.startswith("--") else [option, value]
    return line


def check(run: Run, seconds: float, words: object) -> None:
    """The contract of every command."""
    assert run.code in (0, 1, 2, 3), (words, run)
    assert "Traceback" not in run.err, words
    assert "this is a bug" not in run.err, (words, run.err)
    assert seconds < SECONDS, (words, seconds)
    for stream in (run.out, run.err):
        stream.encode()
        assert not any(ord(c) < 32 and c not in "\n\r\t" for c in stream.replace("\x1b", "")), words
    complaint = [line for line in run.err.splitlines() if line.startswith(("error:", "hint:"))]
    if run.code:
        assert complaint, (words, run)
        assert complaint[0].startswith("error: "), (words, run.err)
        assert len(complaint[0]) < 800, words
    if run.code == 2:
        assert len(complaint) == 2, (words, run.err)
        assert complaint[1].startswith("hint: "), (words, run.err)
        assert run.out == "", words


def attempt(kvfold: Kvfold, place: Place, words: tuple[str, ...], line: list[str]) -> None:
    shutil.rmtree(place.root / "here")
    (place.root / "here").mkdir()
    os.chdir(place.root / "here")
    before = place.listing()
    arguments = [*words, *_resolved(place, line)]
    started = time.monotonic()
    run = kvfold(*arguments)
    check(run, time.monotonic() - started, arguments)
    after = place.listing()
    changed = {name for name in before if after.get(name) != before[name]}
    if run.code in (1, 2):
        left = {name for name in after.keys() - before.keys() if ".kvfold" not in name}
        assert run.code == 1 or not left, (arguments, left, run.err)
        assert not changed, (arguments, changed)
    for name in after.keys() - before.keys():
        path = Path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if changed - {str(place.root / "here")}:
        assert any(word.startswith("--force") or word.startswith("--save") for word in arguments), (
            arguments, changed,
        )  # fmt: skip


def _resolved(place: Place, line: list[str]) -> list[str]:
    def one(word: str) -> str:
        option, at, path = word.partition("@")
        known = at and (not option or option.endswith("="))
        return option + place.path(path) if known else word

    return [one(word) for word in line]


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
@settings(
    max_examples=int(os.environ.get("KVFOLD_FUZZ", "12")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(data=st.data())
def test_any_input(words: tuple[str, ...], data: Any, kvfold: Kvfold, place: Place) -> None:
    line = data.draw(command_lines(words))
    attempt(kvfold, place, words, line)


def _refused(run: Run, *words: str) -> None:
    check(run, 0, words)
    assert run.code == 2, run.out
    for word in words:
        assert word in run.err, run.err


def test_options_that_would_be_ignored_are_refused(kvfold: Kvfold, place: Place) -> None:
    model, text = place.path("MODEL"), place.path("TEXT")
    _refused(kvfold("eval", model, "--needle", 64, "--max-kl", 0.1), "--max-kl", "--text")
    _refused(kvfold("eval", model, "--text", text, "--limit", 3), "--limit", "--tasks")
    _refused(kvfold("look", model, "w3", "--png", ".", "--layer", 0, "--layer", 1), "--png")
    _refused(kvfold("heal", model, "out", "--teacher", model, "--text", text, "--stages", ","),
             "--stages", "empty")  # fmt: skip


def test_repeated_options_are_one(kvfold: Kvfold, place: Place) -> None:
    png = place.path("one.png")
    run = kvfold("look", place.path("MODEL"), "w3 w4", "--layer=1", "--layer=1", "--png", png)
    assert (run.code, len(run.out.splitlines())) == (0, 1), run.err


def test_numbers_correct_this_machine_too(kvfold: Kvfold, place: Place) -> None:
    run = kvfold("plan", place.path("MODEL"), "--gpu", "here", "--memory", 7, "--json")
    found: Any = run.json()
    assert found["hardware"]["memory"] == 7e9


def test_demo_trains_nothing_for_a_folder_that_cannot_be(kvfold: Kvfold, place: Place) -> None:
    for out in ("TEXT", "TEXT/x", "n" * 300, "DEVICE", "FIFO"):
        if out != "DEVICE" or (place.root / out).exists():
            run = kvfold("demo", "--out", place.path(out))
            assert (run.code, "enough" in run.err) == (2, False), run.err
