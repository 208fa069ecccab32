"""vLLM in a process of its own, and in an environment of its own. No torch.

``driver.py`` is what runs there.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvfold.bench.serving.steps import Step
from kvfold.errors import InputError, RunError
from kvfold.names import shown

_DRIVER = Path(__file__).with_name("driver.py")
_GROUP = "vllm.general_plugins"
_LOOK = f"""
import importlib.metadata as metadata, importlib.util as util, json
found = metadata.entry_points(group={_GROUP!r})
print(json.dumps([util.find_spec("vllm") is not None, [each.value for each in found]]))
"""
_LOOK_SECONDS = 60
_GOODBYE_SECONDS = 10
_LONGEST = 300  # characters of what vLLM complained of


def check_python(python: str, plugin: bool) -> None:
    """Look for vLLM, and for kvfold's plugin beside it, without importing either.

    Raises:
        InputError: if it is not there, or ``python`` is no Python.
    """
    try:
        run = subprocess.run(
            [python, "-c", _LOOK],
            capture_output=True, text=True, timeout=_LOOK_SECONDS, check=True,
        )  # fmt: skip
        has_vllm, plugins = json.loads(run.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise InputError(
            f"--python {shown(python)}: this is no Python that runs",
            "give the path of one that has vLLM, such as VENV/bin/python",
        ) from error
    if not has_vllm:
        raise InputError(
            f"there is no vLLM in {shown(python)}",
            "pip install 'kvfold[vllm]' there, or give another --python",
        )
    if plugin and not any(value.startswith("kvfold.") for value in plugins):
        raise InputError(
            f"kvfold is not installed beside the vLLM of {shown(python)}",
            "pip install kvfold there too: vLLM finds its attention as a plugin",
        )


@dataclass(frozen=True)
class Asked:
    """Requests that are all there from the start.

    Attributes:
        computed: whether their prompts are computed, or made up.
        seed: of the prompts' tokens, which are random.
    """

    concurrency: int
    context: int
    output: int
    computed: bool
    seed: int


class Engine:
    """A running vLLM engine.

    Attributes:
        about: what it says of itself: versions, threads, ``cache_tokens``.
    """

    def __init__(self, name: str, python: str, settings: Mapping[str, Any]) -> None:
        """Start it, which takes half a minute or more.

        Args:
            name: what messages call it. settings: for ``driver.py``.

        Raises:
            RunError: if it does not start.
        """
        self._name = name
        self._stack = ExitStack()
        log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._log = self._stack.enter_context(log)
        self._process = subprocess.Popen(
            [python, str(_DRIVER), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, env=_environment(settings["threads"]),
        )  # fmt: skip
        try:
            self.about = self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, asked: Asked) -> tuple[list[Step], list[int]]:
        """Serve some requests: the steps that took, and the first token of each request.

        Raises:
            RunError: if the engine fails.
        """
        assert self._process.stdin is not None
        line = vars(asked) | {"vocabulary": self.about["vocabulary"]}
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed() from error
        found = self._read()
        return [Step(*step) for step in found["steps"]], found["first"]

    def close(self) -> None:
        """End it."""
        process = self._process
        try:
            process.communicate(timeout=_GOODBYE_SECONDS)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        finally:
            self._stack.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._failed()
        found: dict[str, Any] = json.loads(line)
        return found

    def _failed(self) -> RunError:
        """What its log ends with."""
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines or ["nothing was said"]
        return RunError(
            f"{self._name}: vLLM ended: {errors[-1][:_LONGEST]}",
            "try the same model and options with `vllm serve`, which tells more",
        )


def _environment(threads: int | None) -> dict[str, str]:
    """This process's, and what keeps the engine in one process and its settings ours."""
    own = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    return own if threads is None else own | {"OMP_NUM_THREADS": str(threads)}
