"""A source, its fold, a text and an uninterrupted run, for the tests of healing."""

from pathlib import Path

import pytest

from kvfold import convert, heal
from tests.toolbox import tiny
from tests.toolbox.healing_cases import OPTIONS


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.make("llama", num_key_value_heads=6)
    return tiny.save_with_tokenizer(model, tmp_path_factory.mktemp("heal") / "source")


@pytest.fixture(scope="package")
def folded(source: Path) -> Path:
    convert(source, source.parent / "folded", 1, calibrate=False)
    return source.parent / "folded"


@pytest.fixture(scope="package")
def text(source: Path) -> Path:
    path = source.parent / "text.txt"
    path.write_text("\n\n".join(tiny.words(300, seed) for seed in range(40)))
    return path


@pytest.fixture(scope="package")
def healed(source: Path, folded: Path, text: Path) -> Path:
    """An uninterrupted run."""
    heal(folded, source.parent / "healed", source, [text], **OPTIONS)
    return source.parent / "healed"
