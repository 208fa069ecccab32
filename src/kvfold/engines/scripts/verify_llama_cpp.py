"""llama.cpp: its converter makes a GGUF file, its server runs it (a program, or ``xllamacpp``)."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from verify_task import AbsentError, Answer, Stage, Task, installed

_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_CONVERTER = "convert_hf_to_gguf.py"


def version(task: Task) -> str:
    """The version of ``xllamacpp``, or what the server says of itself."""
    if find_spec("xllamacpp"):
        return f"xllamacpp {installed('xllamacpp', 'xllamacpp')}"
    server = _server(task)
    if server is None:
        raise AbsentError("not installed: neither llama-server nor the package xllamacpp")
    told = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=60)
    lines = [line for line in (told.stdout + told.stderr).splitlines() if "version" in line]
    return lines[0].removeprefix("version: ") if lines else "of unknown version"


def load(task: Task, stage: Stage) -> tuple[Callable[[], Answer], str]:
    """A server that keeps its cache in the task's dtype too."""
    stage("converting")
    gguf = _convert(task)
    stage("loading")
    start = _in_process if find_spec("xllamacpp") else _process
    try:
        address = start(gguf, task)
    except RuntimeError as error:
        raise RuntimeError(_complaint() or str(error)) from None

    def generate() -> Answer:
        return [_complete(address, prompt, task.tokens) for prompt in task.prompts]

    return generate, _CONVERTER


def _convert(task: Task) -> Path:
    """The checkpoint as a GGUF file."""
    places = [Path(task.llama_cpp) / _CONVERTER] if task.llama_cpp else []
    on_path = shutil.which(_CONVERTER)
    places += [Path(on_path)] if on_path else []
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise AbsentError(f"converter missing: name a checkout of llama.cpp that has {_CONVERTER}")
    gguf = Path(task.work) / "model.gguf"
    words = [task.folder, "--outfile", str(gguf), "--outtype", _TYPES[task.dtype]]
    run = subprocess.run([sys.executable, str(found), *words], capture_output=True, text=True)
    sys.stderr.write(run.stderr)
    if run.returncode or not gguf.is_file():
        lines = run.stderr.strip().splitlines() or ["it says nothing"]
        raise RuntimeError(f"{_CONVERTER}: {_cause(lines)}")
    return gguf


def _cause(lines: list[str]) -> str:
    """The line of a log that says what went wrong."""
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines)[-1].removeprefix("ERROR:hf-to-gguf:")


def _server(task: Task) -> str | None:
    """The program, from the checkout or from where programs are."""
    built = Path(task.llama_cpp) / "build" / "bin" / "llama-server"
    return str(built) if task.llama_cpp and built.is_file() else shutil.which("llama-server")


def _in_process(gguf: Path, task: Task) -> str:
    """The address of a server in this process."""
    import xllamacpp

    kept = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{_TYPES[task.dtype].upper()}")
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.warmup = task.length + 8, 1, False
    params.cache_type_k = params.cache_type_v = kept
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    _in_process.server = xllamacpp.Server(params)  # type: ignore[attr-defined]  # kept alive
    return str(_in_process.server.listening_address)  # type: ignore[attr-defined]


def _process(gguf: Path, task: Task) -> str:
    """The address of a server in a process of its own, which ends with this one's group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = _TYPES[task.dtype]
    words = ["-m", str(gguf), "-c", str(task.length + 8), "-np", "1", "--no-warmup"]
    words += ["--cache-type-k", kept, "--cache-type-v", kept, "--flash-attn", "off"]
    server = str(_server(task))
    process = subprocess.Popen([server, *words, "--host", "127.0.0.1", "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return address
        except OSError:  # not there yet, or loading
            time.sleep(0.2)
    raise RuntimeError(f"llama-server ended with {process.returncode}")


def _complaint() -> str:
    """What the server says of a model that it does not load, in the log that stderr is."""
    try:
        said = os.pread(2, os.fstat(2).st_size, 0).decode(errors="replace")
    except OSError:  # no file
        return ""
    words = "error loading model: "
    lines = [line.partition(words)[2] for line in said.splitlines() if words in line]
    return lines[-1] if lines else ""


def _complete(address: str, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Greedy tokens after one prompt; fewer where the model ends its answer."""
    asked = {
        "prompt": list(prompt), "n_predict": tokens, "temperature": 0.0, "top_k": 1,
        "cache_prompt": False, "return_tokens": True,
    }  # fmt: skip
    body = Request(f"{address}/completion", json.dumps(asked).encode())
    body.add_header("Content-Type", "application/json")
    with urlopen(body) as reply:
        found: Any = json.load(reply)
    return [int(token) for token in found["tokens"]]
