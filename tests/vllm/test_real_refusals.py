"""What the plugin refuses, in one line; and that vLLM is as it was for who does not ask for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold.kernels.limits import MAX_DIM
from tests.toolbox.vllm_cases import OURS, OWN, VllmLayer, needs_vllm
from tests.toolbox.vllm_engines import backends_of, engine, greedy, prompts, tiny_folder

pytestmark = [pytest.mark.real, needs_vllm]

LAYER: dict[str, Any] = {"backend": OURS, "heads": (4, 2), "head_size": 64}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a format of another engine": ({"cache_dtype": "fp8_e5m2"}, "kv_cache_dtype=fp8_e5m2"),
    "a format of NVIDIA's": ({"cache_dtype": "nvfp4"}, "kv_cache_dtype=nvfp4"),
    "heads too large": ({"head_size": MAX_DIM + 32}, f"head_size={MAX_DIM + 32}"),
    "blocks that tiles do not fill": ({"block_size": 40}, "block_size=40"),
    "an encoder": ({"options": {"attn_type": "encoder_only"}}, "attention type encoder_only"),
    "scores that may be of any sign": (
        {"options": {"alibi_slopes": [0.1] * 4, "use_alibi_sqrt": True}},
        "use_alibi_sqrt",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_it_lacks_something_for(case: str) -> None:
    given, named = REFUSED[case]
    with pytest.raises(ValueError, match=OURS) as caught:
        VllmLayer(**LAYER | given)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vllms_own_backend_where_told_to_fall_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVFOLD_VLLM_FALLBACK", "1")
    caplog.set_level("WARNING", "vllm.kvfold")
    layer = VllmLayer(**LAYER | {"cache_dtype": "fp8_e5m2"})
    assert layer.layer.attn_backend.get_name() == OWN
    [line] = [r.getMessage() for r in caplog.records if OURS in r.getMessage()]
    assert "kv_cache_dtype=fp8_e5m2" in line
    assert "vLLM's own" in line


def test_latent_attention() -> None:
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    config = VllmLayer(**LAYER).config
    with set_current_vllm_config(config), pytest.raises(ValueError, match="MLA not supported"):
        get_attn_backend(576, torch.bfloat16, "auto", use_mla=True)


def test_memory_for_less_than_one_sequence(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    with (
        pytest.raises(ValueError, match="max seq len") as caught,
        engine(folder, kv_cache_dtype="int4_per_token_head", kv_cache_memory_bytes=2**15),
    ):
        pass
    assert "estimated maximum model length" in str(caught.value)  # as vLLM's own says it


def test_who_does_not_ask_gets_vllms_own(tmp_path: Path) -> None:
    folder, found = tiny_folder(tmp_path, "llama"), []
    for backend in (None, OWN):
        with engine(folder, backend) as llm:
            assert backends_of(llm) == {OWN}
            found.append(greedy(llm, prompts(40)))
    assert found[0] == found[1]


def in_another_process(program: str, **environment: str) -> Any:
    """Run a program that must find vLLM as it is before anything is loaded."""
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


UNKNOWN = """
import vllm
vllm.__version__ = "0.33.1"
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
before = CpuPlatform.get_attn_backend_cls.__func__
from vllm.plugins import load_general_plugins
load_general_plugins()
assert "KVFOLD" not in AttentionBackendEnum.__members__
assert CpuPlatform.get_attn_backend_cls.__func__ is before
"""


def test_a_release_that_it_does_not_know_is_left_alone() -> None:
    done = in_another_process(UNKNOWN)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "KVFOLD" in line]
    assert len(lines) == 1
    assert "0.33.1" in lines[0]
    assert "pip install 'vllm==0.32.*'" in lines[0]


WITHOUT = """
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert ("KVFOLD" in AttentionBackendEnum.__members__) == {there}
"""


@pytest.mark.parametrize(("plugins", "there"), [("", False), ("kvfold", True)])
def test_plugins_that_are_not_to_be_loaded(plugins: str, there: bool) -> None:
    done = in_another_process(WITHOUT.format(there=there), VLLM_PLUGINS=plugins)
    assert done.returncode == 0, done.stderr
