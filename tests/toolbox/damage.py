"""Files damaged in every way, and what a command may answer to them."""

import copy as copying
import json
import time
from typing import Any

from hypothesis import strategies as st

from tests.conftest import Kvfold, Run

STRANGE: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 1.5, 10**9, 10**12, 10**40, -(10**12), float("nan"),
    float("inf"), "", "2", "x" * 1000, "../x", "/etc/passwd", "\ud800", [], [[]], {}, {"a": 1},
]  # fmt: skip
steps = st.lists(st.integers(0, 1000), min_size=1, max_size=4)
changes = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(STRANGE)),
    st.tuples(st.just("drop"), st.none()),
    st.tuples(st.just("wrap"), st.integers(1, 200)),
)
damage = st.one_of(
    st.tuples(st.just("value"), steps, changes),
    st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
)


def changed(document: Any, path: list[int], change: tuple[str, Any]) -> Any:
    """The document with one value below ``path`` (indices, taken modulo) changed."""
    root: Any = [copying.deepcopy(document)]
    holder, key = root, 0
    for step in path:
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, keys[step % len(inner)]
    kind, value = change
    if kind == "drop" and holder is not root:
        del holder[key]
    elif kind == "wrap":
        for _ in range(value):
            holder[key] = [holder[key]]
    else:
        holder[key] = value
    return root[0]


def damaged(text: bytes, how: tuple[str, Any, Any]) -> bytes:
    kind, where, what = how
    if kind == "value":
        return json.dumps(changed(json.loads(text), where, what)).encode()
    at = int(where * (len(text) - 1))
    if kind == "cut":
        return text[:at]
    return text[:at] + bytes([text[at] ^ (1 << what)]) + text[at + 1 :]


def answered(kvfold: Kvfold, command: tuple[Any, ...]) -> Run:
    """What a command says: its answer, or in one line why there is none."""
    started = time.monotonic()
    run = kvfold(*command)
    assert time.monotonic() - started < 20, command
    assert run.code in (0, 1, 2), (command, run.err)
    assert "this is a bug" not in run.err, (command, run.err)
    assert "Traceback" not in run.err
    if run.code:
        lines = [line for line in run.err.splitlines() if line.startswith(("error: ", "hint: "))]
        assert lines, run.err
        assert lines[0].startswith("error: "), run.err
        assert run.code == 1 or lines[-1].startswith("hint: "), run.err
    return run
