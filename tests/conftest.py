"""Shared fixtures."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# Without a GPU, Triton's kernels are interpreted. That must be said before Triton is imported,
# which PyTorch does.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # as many as there are cores: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"

from kvfold.cli.main import main
from tests.toolbox import tiny
from tests.toolbox.attention_cases import DEFAULT_DTYPES, default_dtype

# The same examples in every run, so that a failure is the change's own; KVFOLD_FUZZ draws others.
settings.register_profile("same", derandomize="KVFOLD_FUZZ" not in os.environ)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--default-dtype",
        default="float32",
        choices=("float32", *DEFAULT_DTYPES),
        help="PyTorch's default dtype while tests run; programs that load models change it",
    )


@pytest.fixture(autouse=True, scope="session")
def _default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    with default_dtype(str(request.config.getoption("--default-dtype"))):
        yield


@pytest.fixture(autouse=True, scope="session")
def _computed_in_float32() -> Iterator[None]:
    """By default, on processors that multiply bfloat16 as on others: many results are exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvfold.quality.device.has_bf16", lambda device: False)
        yield


@dataclass
class Run:
    """What a command answered."""

    code: int
    out: str
    err: str

    def json(self) -> object:
        return json.loads(self.out)


Kvfold = Callable[..., Run]


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str]) -> Kvfold:
    """Run the command line in this process."""

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MHA llama (6 KV heads) on disk in one file; read only."""
    model = tiny.make("llama", num_key_value_heads=6)
    return tiny.save_with_tokenizer(model, tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several shards with an index; read only."""
    model = tiny.make("llama", num_key_value_heads=6)
    folder = tmp_path_factory.mktemp("source") / "sharded"
    return tiny.save_with_tokenizer(model, folder, max_shard_size="60KB")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny.words(4000), encoding="utf-8")
    return path
