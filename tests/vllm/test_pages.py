"""What vLLM is told of kvfold's formats."""

import pytest
import torch

from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.ops.formats import FORMATS, format_of
from kvfold.vllm.batch import groups
from kvfold.vllm.pages import FORMATS as NAMES
from kvfold.vllm.pages import PageFormat, format_named
from tests.toolbox.attention_cases import skip_without_kernels


@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (80, 80), (20, 13), (192, 128)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_takes_what_it_takes_in_kvfolds_own_cache(
    name: str, sizes: tuple[int, int]
) -> None:
    skip_without_kernels()
    cache = KVCache(
        3, head_dim=sizes[0], v_head_dim=sizes[1], batch=1, dtype=name, kind="paged", page_size=64,
        exact_first=0, exact_recent=0,
    )  # fmt: skip
    page = PageFormat(format_of(name), *sizes, page_size=64, packed=True)
    assert 3 * page.token_bytes == cache._storage.main.bytes_per_token


@pytest.mark.parametrize(
    ("name", "times"), [("fp8", 1.9), ("int8", 1.9), ("int4", 3.4), ("bf16", 1.0)]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_how_many_times_more_tokens_fit(name: str, times: float, dim: int) -> None:
    page = PageFormat(format_of(name), dim, dim, 128, packed=True)
    assert 2 * 2 * dim / page.token_bytes >= times


def test_names_of_vllms_mean_formats() -> None:
    known = {format_named(name, torch.float16).name for name in NAMES}
    assert known == {"fp16", "bf16", "fp8", "int8", "int4"}
    assert format_named("auto", torch.float32).name == "fp32"
    with pytest.raises(InputError, match="not a format"):
        format_named("fp8_e5m2", torch.bfloat16)


def test_sequences_go_together_where_they_have_equally_many_new_tokens() -> None:
    table = torch.arange(24, dtype=torch.int32).view(6, 4)
    begins, lengths = [0, 1, 2, 6, 46, 47, 47], [5, 6, 7, 48, 9, 0]
    found = groups(begins, lengths, table)
    assert [(x.tokens, x.ends, x.starts, x.most) for x in found] == [
        (1, [5, 6, 9], [4, 5, 8], 9),
        (4, [7], [3], 7),
        (40, [48], [8], 48),
    ]
    ones, few, many = found
    assert isinstance(ones.rows, torch.Tensor)
    assert ones.rows.tolist() == [0, 1, 46]
    assert few.rows == slice(2, 6)
    assert many.rows == slice(6, 46)
    assert torch.equal(ones.table, table[[0, 1, 4]])
    x = torch.arange(47)[:, None, None].float()
    assert ones.of(x)[:, 0, 0, 0].tolist() == [0, 1, 46]
    assert few.of(x).data_ptr() == x[2:].data_ptr()


def test_two_prompts_of_one_length_are_two_calls() -> None:
    found = groups([0, 17, 34], [17, 17], torch.zeros(2, 2, dtype=torch.int32))
    assert [x.rows for x in found] == [slice(0, 17), slice(17, 34)]
