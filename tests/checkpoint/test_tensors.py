"""Our streaming safetensors against the safetensors package."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvfold.checkpoint.tensors import (
    TORCH_NAMES,
    TensorSpec,
    dtype_name,
    read_header,
    read_tensor,
    torch_dtype,
    write_tensors,
)
from kvfold.errors import CheckpointError

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.dictionaries(
    st.text("abc._0", min_size=1, max_size=8),
    st.tuples(shapes, st.sampled_from(["F32", "BF16", "F16", "I64", "BOOL", "U8"])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40)
@given(tensors)
def test_round_trips_with_the_package(
    tmp_path_factory: pytest.TempPathFactory,
    layout: dict[str, tuple[tuple[int, ...], str]],
) -> None:
    folder = tmp_path_factory.mktemp("t")
    values = {
        name: (torch.rand(shape) * 100).to(torch_dtype(dtype))
        for name, (shape, dtype) in layout.items()
    }
    save_file(values, folder / "theirs.safetensors")
    entries = read_header(folder / "theirs.safetensors")
    assert set(entries) == set(values)
    for name, value in values.items():
        assert torch.equal(read_tensor(entries[name]), value)
    specs = [TensorSpec(n, dtype_name(v.dtype), tuple(v.shape)) for n, v in values.items()]
    write_tensors(folder / "ours.safetensors", specs, iter(values.values()))
    loaded = load_file(folder / "ours.safetensors")
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_dtype_names_are_one_to_one() -> None:
    for name in TORCH_NAMES:
        assert dtype_name(torch_dtype(name)) == name


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def values() -> Iterator[torch.Tensor]:
        yield torch.zeros(2)
        raise KeyboardInterrupt

    specs = [TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))]
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "x.safetensors", specs, values())
    assert not (tmp_path / "x.safetensors").exists()


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a: expected F32 \[2\], got F32 \[3\]"):
        write_tensors(tmp_path / "x", [TensorSpec("a", "F32", (2,))], iter([torch.zeros(3)]))


def test_extra_bytes_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="too long"):
        read_header(path)
