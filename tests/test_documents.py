"""The one reader of JSON: whatever is wrong becomes one error that names it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.arch.config import CONFIG
from kvfold.checkpoint.schemas import ENTRIES, HEADER, INDEX_FILE
from kvfold.documents import DEEPEST, Document, file_within, open_regular
from kvfold.errors import CheckpointError, InputError, KVFoldError

ANYTHING: Document[Any] = Document(dict[str, Any], "mend it", largest=1 << 20)
CONFIG_TEXT = json.dumps(
    {
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "rope_parameters": {"rope_theta": 10000.0},
        "layer_types": ["full_attention"] * 2,
    }
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(
        st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values))
def test_what_json_can_hold_comes_back_as_it_was(value: dict[str, Any]) -> None:
    found = ANYTHING.parse(json.dumps(value).encode(), "x.json")
    assert found == value
    assert list(found) == list(value)


def answer(kind: Document[Any], data: bytes) -> str:
    """What is said about a document: whether it is read, or why not."""
    try:
        kind.parse(data, "x.json")
    except CheckpointError as error:
        return error.message if error.hint else "no hint"
    return "x.json is read"


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for kind in (ANYTHING, CONFIG, INDEX_FILE, HEADER):
        assert answer(kind, data).startswith("x.json")


@settings(max_examples=300)
@given(st.integers(0, len(CONFIG_TEXT) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_document_is_read_or_refused(at: int, inserted: bytes, cut: int) -> None:
    whole = CONFIG_TEXT.encode()
    assert answer(CONFIG, whole[:at] + inserted + whole[at + cut :]).startswith("x.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
        (b'{"a": 1, "a": 2}', "the key a stands twice"),
        (b'{"a": {"b": [0, NaN]}}', "a.b[1] is nan"),
        (b'{"a": -Infinity}', "a is -inf"),
        (b'{"a": 1e999}', "a is inf"),
        (b'{"a": ' + b"1" * 5000 + b"}", "5000 digits"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", "nested too deeply"),
    ],
)
def test_what_is_wrong_is_named(text: bytes, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ANYTHING.parse(text, "x.json")
    assert caught.value.message.startswith("x.json")
    assert words in caught.value.message


def test_brackets_inside_strings_are_no_nesting() -> None:
    text = json.dumps({"a": '[{"\\' * 1000, "b": "[" * 1000})
    assert ANYTHING.parse(text.encode(), "x.json") == json.loads(text)


@pytest.mark.parametrize("piece", [b'"', b'\\"', b'["', b"[[],", b'{"a":'])
def test_reading_takes_time_in_proportion(piece: bytes) -> None:
    """A megabyte of any pattern is refused at once, also where a parser might start over."""
    for head in (b"", b'{"a": "', b"[" * 70):
        started = time.monotonic()
        with pytest.raises(KVFoldError):
            ANYTHING.parse(head + piece * ((1 << 20) // len(piece)), "x.json")
        assert time.monotonic() - started < 5


@given(
    st.sampled_from(["num_attention_heads", "num_key_value_heads", "num_hidden_layers",
                     "hidden_size", "head_dim", "intermediate_size", "vocab_size"]),
    st.one_of(
        st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
        st.integers(max_value=-1), st.integers(min_value=1 << 27), st.just({}), st.just([]),
    ),
)  # fmt: skip
def test_sizes_are_whole_numbers_within_bounds(key: str, value: Any) -> None:
    changed = json.loads(CONFIG_TEXT) | {key: value}
    with pytest.raises(CheckpointError, match=rf"^config\.json: {key}.* expected"):
        CONFIG.parse(json.dumps(changed).encode(), "config.json")


def test_unknown_keys_are_kept_and_so_is_their_order() -> None:
    text = b'{"zeta": 1, "model_type": "llama", "alpha": {"x": [1]}}'
    assert list(CONFIG.parse(text, "config.json")) == ["zeta", "model_type", "alpha"]
    assert CONFIG.parse(b'{"time_step_limit": [0.0, Infinity]}', "c")


def test_a_missing_key_is_named_where_it_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"x: w\.dtype is missing"):
        ENTRIES.check({"w": {"shape": [], "data_offsets": [0, 4]}}, "x")


# -- files ----------------------------------------------------------------------------------


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name, kind in (("fifo", "FIFO"), ("folder", "folder"), ("link", "FIFO")):
        with pytest.raises(InputError, match=kind):
            open_regular(tmp_path / name)
    with pytest.raises(InputError, match="device"):
        open_regular(Path("/dev/zero"))
    for odd in ("absent", "a\0b", "x" * 300):
        with pytest.raises(InputError, match="cannot read"):
            open_regular(tmp_path / odd)


def test_large_documents_and_lines_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no space
    with pytest.raises(InputError, match="too large"):
        ANYTHING.read(path)
    with pytest.raises(CheckpointError, match="line 1 is longer than 1 MiB"):
        next(ANYTHING.lines(path))


def test_lines_are_numbered_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "one\u2028line"}\n\n{"b": 2}\n{"c": ', encoding="utf-8")
    assert [number for number, _ in ANYTHING.lines(path, torn=True)] == [1, 3]
    with pytest.raises(CheckpointError, match=r"x\.jsonl line 4 is not valid JSON"):
        list(ANYTHING.lines(path))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\0b", "out/x"])
def test_named_files_lie_in_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        file_within(folder, name, "index.json")


def test_links_within_the_folder_and_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("x")
    (folder / "weights").symlink_to("../../blobs/0123")
    (folder / "again").symlink_to("weights")
    assert file_within(folder, "weights", "index") == folder / "weights"
    assert file_within(folder, "again", "index")
    (tmp_path / "stray").write_text("x")
    (folder / "stray").symlink_to(tmp_path / "stray")
    with pytest.raises(CheckpointError, match="outside"):
        file_within(folder, "stray", "index")
