"""Engines that are none: programs that answer as an engine's script would."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("w3 w4 w5", "w40 w7 w90 w11")
STEPS = 8
SPECIAL = (0, 1, 2)

_PROGRAM = """#!{python}
import json, os, signal, subprocess, sys, time
task, file = json.load(sys.stdin), int(sys.argv[3])
def tell(**what):
    os.write(file, (json.dumps(what) + "\\n").encode())
if {version!r} is not None:
    tell(version={version!r})
if not task.get("prompts"):
    {there}
    sys.exit()
tell(stage="converting")
open(task["work"] + "/converted", "w").write("x" * 1000)
tell(how="by itself", stage="generating")
{body}
"""

#: Makes a program of what it does when it is asked for tokens, and says what ``--python`` takes.
Program = Callable[..., str]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    def make(body: str, engine: str = "vllm", version: str | None = "1.2", there: str = "") -> str:
        path = tmp_path / f"python of {engine}"
        text = _PROGRAM.format(
            python=sys.executable, version=version, body=body, there=there or "pass"
        )
        path.write_text(text)
        path.chmod(0o755)
        return f"{engine}={path}"

    return make


def answering(tokens: object) -> str:
    """A program's body that answers."""
    return f"tell(answer=json.loads({json.dumps(tokens)!r}))"


@pytest.fixture(scope="session")
def expected(llama_folder: Path) -> list[list[int]]:
    """Greedy tokens by ``generate``, up to the first special one."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(llama_folder)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(ids, max_new_tokens=STEPS, do_sample=False, eos_token_id=SPECIAL)
        found.append(made[0, ids.shape[1] :].tolist())
    return found
