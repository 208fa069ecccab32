"""``kvfold verify`` with engines that agree, differ, refuse, crash, hang, and are not there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvfold import verify
from kvfold.engines.known import ENGINES
from kvfold.engines.request import VerifyRequest
from kvfold.errors import InputError
from tests.conftest import Kvfold, Run
from tests.engines.conftest import PROMPTS, SPECIAL, STEPS, Program, answering
from tests.toolbox.commands import complaint


@pytest.fixture(autouse=True)
def _no_engines_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for engine in ENGINES.values():
        monkeypatch.delenv(engine.variable, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def run(kvfold: Kvfold, llama_folder: Path) -> Any:
    def with_engines(*pythons: str, words: tuple[object, ...] = ()) -> Run:
        names = ",".join(python.partition("=")[0] for python in pythons)
        given = [word for python in pythons for word in ("--python", python)]
        given += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        return kvfold("verify", llama_folder, "--engines", names, "--tokens", STEPS, *given, *words)

    return with_engines


def outcomes(run: Run) -> dict[str, Any]:
    document: Any = run.json()
    return {found["engine"]: found for found in document["engines"]}


def changed(expected: list[list[int]], prompt: int, token: int) -> list[list[int]]:
    """The same with another word in one place."""
    other = [list(each) for each in expected]
    other[prompt][token] = 3 + (other[prompt][token] - 2) % 90
    return other


def logits_before(folder: Path, prompt: str, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    with torch.no_grad():
        return model(torch.tensor([ids + tokens])).logits[0, -1]


def test_an_engine_that_agrees(run: Any, program: Program, expected: list[list[int]]) -> None:
    found = run(program(answering(expected)), words=("--json",))
    assert found.code == 0, found.err
    document: Any = found.json()
    assert document["same"]
    assert [each["tokens"] for each in document["prompts"]] == expected
    total = sum(map(len, expected))
    vllm = outcomes(found)["vllm"]
    assert (vllm["status"], vllm["version"], vllm["how"]) == ("same", "1.2", "by itself")
    assert (vllm["equal"], vllm["compared"], vllm["differences"]) == (total, total, [])


def test_the_table_fits_a_terminal(run: Any, program: Program, expected: list[list[int]]) -> None:
    found = run(program(answering(expected)), program("sys.exit(3)", "litgpt"))
    assert max(map(len, found.out.splitlines())) <= 80
    total = sum(map(len, expected))
    assert f"{total} of {total}" in found.out


def test_an_engine_that_differs(
    run: Any, program: Program, expected: list[list[int]], llama_folder: Path
) -> None:
    """It is told where, and by how much the reference prefers its own token."""
    other = changed(expected, 1, 2)
    found = run(program(answering(other)), words=("--json",))
    assert found.code == 3
    assert "vllm gives other tokens" in found.err
    vllm = outcomes(found)["vllm"]
    assert vllm["equal"] == len(expected[0]) + 2
    (difference,) = vllm["differences"]
    assert (difference["prompt"], difference["token"]) == (2, 3)
    logits = logits_before(llama_folder, PROMPTS[1], expected[1][:2])
    gap = float(logits[expected[1][2]] - logits[other[1][2]])
    assert difference["gap"] == pytest.approx(gap, abs=1e-4)
    assert (difference["expected"], difference["found"]) == (
        f"w{expected[1][2]}", f"w{other[1][2]}",
    )  # fmt: skip


@pytest.mark.parametrize(("factor", "code"), [(1.01, 0), (0.99, 3)])
def test_close_calls_pass_only_if_told_to(
    factor: float, code: int, run: Any, program: Program, expected: list[list[int]]
) -> None:
    python = program(answering(changed(expected, 0, 4)))
    (difference,) = outcomes(run(python, words=("--json",)))["vllm"]["differences"]
    found = run(python, words=("--json", "--near", difference["gap"] * factor))
    assert found.code == code, found.err
    vllm = outcomes(found)["vllm"]
    assert vllm["near_ties"] == (code == 0)
    # What follows a near tie is not compared; it does not count as equal.
    rest = 0 if code == 0 else len(expected[0]) - 4
    assert vllm["compared"] - vllm["equal"] == rest


def test_answers_that_end(run: Any, program: Program, expected: list[list[int]]) -> None:
    """Ending is right where the model's next token is a special one, and wrong elsewhere."""
    without = [[token for token in each if token not in SPECIAL] for each in expected]
    assert run(program(answering(without))).code == 0
    found = run(program(answering([without[0], without[1][:1]])))
    assert found.code == 3
    assert "ended before" in found.out


def test_what_follows_the_answer_is_not_compared(
    run: Any, program: Program, expected: list[list[int]]
) -> None:
    assert run(program(answering([[*each, 5, 6] for each in expected]))).code == 0


def test_engines_that_are_not_there(run: Any, program: Program, expected: list[list[int]]) -> None:
    missing = program("", "litgpt", None, there='tell(absent="not installed")')
    found = run(program(answering(expected)), missing, words=("--json",))
    assert found.code == 0, found.err
    assert outcomes(found)["litgpt"]["status"] == "absent"
    assert "not installed" in outcomes(found)["litgpt"]["why"]
    complaint(run(missing), "litgpt", "not installed")


def test_all_that_are_found_by_default(
    kvfold: Kvfold, program: Program, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are not told of; the environment may say where they are."""
    absent = 'tell(absent="not installed")'
    for engine in ENGINES.values():
        python = program("", engine.name, None, there=absent)
        monkeypatch.setenv(engine.variable, python.partition("=")[2])
    complaint(kvfold("verify", llama_folder), "none of vllm")
    program("tell(answer=[[5]])", "ctranslate2")
    found = kvfold("verify", llama_folder, "--prompt", "w3", "--tokens", 1, "--json")
    assert outcomes(found).keys() == {"ctranslate2"}


def test_an_engine_that_refuses_is_told_of(
    run: Any, program: Program, expected: list[list[int]]
) -> None:
    refusing = program('tell(refused="unknown architecture"); sys.exit(1)', "litgpt")
    found = run(program(answering(expected)), refusing, words=("--json",))
    assert found.code == 0, found.err
    assert outcomes(found)["litgpt"]["status"] == "refused"
    alone = run(refusing)
    assert alone.code == 1
    assert "unknown architecture" in " ".join(alone.out.split())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('print("out of luck", file=sys.stderr); sys.exit(7)', ["ended with 7", "out of luck"]),
        ("sys.stdout.flush(); os.kill(os.getpid(), signal.SIGSEGV)", ["SIGSEGV"]),
        ("tell(answer=[[1]])", ["another form"]),
        ("tell(answer=[[True], [1]])", ["another form"]),
        ('tell(answer=[["5"], [1]])', ["another form"]),
        ("os.write(file, b'{not json\\n')", ["ended with 0"]),
    ],
)
def test_an_engine_that_fails(body: str, words: list[str], run: Any, program: Program) -> None:
    found = run(program(body))
    assert found.code == 1
    for word in ["error: vllm failed", *words]:
        assert word in found.err


_HANG = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({path!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


def gone(path: Path) -> bool:
    """Whether processes have ended; their parents may still have to take note of it."""
    for pid in map(int, path.read_text().split()):
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z":
            return False
    return True


def test_an_engine_that_hangs_ends_with_all_it_started(
    run: Any, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfold.engines.ask._GRACE", 0.2)
    started = time.monotonic()
    found = run(program(_HANG.format(path=str(tmp_path / "pids"))), words=("--timeout", 1))
    assert time.monotonic() - started < 30
    assert found.code == 1
    assert "no answer in 1 seconds" in found.err
    assert gone(tmp_path / "pids")
    assert not list(tmp_path.glob("kvfold-*"))


def test_conversions_are_gone_afterwards(run: Any, program: Program, tmp_path: Path) -> None:
    body = f'os.symlink(task["work"], {str(tmp_path / "was")!r}); tell(answer=[])'
    run(program(body))
    assert (tmp_path / "was").is_symlink()
    assert not (tmp_path / "was").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    number: signal.Signals, program: Program, llama_folder: Path, tmp_path: Path
) -> None:
    python = program(_HANG.format(path=str(tmp_path / "pids")))
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfold", "verify", str(llama_folder), "--engines", "vllm",
         "--prompt", "w3", "--tokens", "2", "--python", python],
        stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (130, b"error: interrupted; nothing was overwritten\n")
    assert gone(tmp_path / "pids")
    assert not list((tmp_path / "temporary").iterdir())


def test_from_python(program: Program, expected: list[list[int]], llama_folder: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    found = verify(
        llama_folder, engines=["vllm"], prompts=PROMPTS, tokens=STEPS,
        pythons=[program(answering(expected))],
        progress=lambda *what: stages.append(what),
    )  # fmt: skip
    assert found.same
    assert [outcome.status for outcome in found.outcomes] == ["same"]
    assert stages[-1] == ("vllm: generating", 1, 1)
    assert ("vllm: converting", 0, 1) in stages


def test_prompts_of_a_file(
    kvfold: Kvfold, program: Program, llama_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("w3 w4\n\nw5\n")
    words = ("--prompts", tmp_path / "prompts", "--tokens", 1, "--engines", "vllm", "--json")
    python = ("--python", program("tell(answer=[])"))
    found: Any = kvfold("verify", llama_folder, *words, *python).json()
    assert [each["prompt"] for each in found["prompts"]] == ["w3 w4", "w5"]
    more: Any = kvfold("verify", llama_folder, *words, *python, "--prompt", "w6").json()
    assert [each["prompt"] for each in more["prompts"]] == ["w3 w4", "w5", "w6"]


def test_wrong_input(kvfold: Kvfold, llama_folder: Path, program: Program, tmp_path: Path) -> None:
    python = program("tell(answer=[])")
    words = ("verify", llama_folder, "--engines", "vllm")
    complaint(kvfold(*words, "--python", "vllm"), "--python vllm", "an engine and a Python")
    complaint(kvfold(*words, "--python", "vlm=/bin/sh"), "did you mean vllm")
    complaint(kvfold(*words, "--python", f"vllm={tmp_path}/no"), "no such program")
    complaint(kvfold(*words, "--python", python, "--prompt", " "), "--prompt is empty")
    complaint(
        kvfold(*words, "--python", python, "--prompt", "w3", "--tokens", 128), "128 positions"
    )
    complaint(kvfold("verify", llama_folder, "--engines", "vlm"), "did you mean vllm")


def test_the_environment_names_a_program_that_is_not_there(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_PYTHON_LLAMA_CPP", "/nowhere/python")
    with pytest.raises(InputError, match="KVFOLD_PYTHON_LLAMA_CPP /nowhere/python: no such"):
        verify(llama_folder)


_VLLM = """
import json, os
class SamplingParams:
    def __init__(self, **options):
        assert options["temperature"] == 0 and options["ignore_eos"]
        self.count = options["max_tokens"]
class LLM:
    def __init__(self, model, dtype, max_model_len, **options):
        assert dtype == "float32"
        self.answers = json.load(open(os.environ["ANSWERS"]))
    def generate(self, prompts, how, **options):
        answers = [self.answers[str(p["prompt_token_ids"])][:how.count] for p in prompts]
        Output = type("Output", (), {})
        found = []
        for answer in answers:
            request, output = Output(), Output()
            output.token_ids, request.outputs = answer, [output]
            found.append(request)
        print("engines talk" * 1000)
        return found
"""


def test_the_stand_alone_script(
    kvfold: Kvfold, llama_folder: Path, expected: list[list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The real script, with a package that only looks like the engine."""
    (tmp_path / "vllm.py").write_text(_VLLM)
    tokenizer: Any = AutoTokenizer.from_pretrained(llama_folder)
    pairs = zip(PROMPTS, expected, strict=True)
    answers = {str(tokenizer(prompt)["input_ids"]): tokens for prompt, tokens in pairs}
    (tmp_path / "answers").write_text(json.dumps(answers))
    monkeypatch.setenv("ANSWERS", str(tmp_path / "answers"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    words = ("--engines", "vllm", "--tokens", STEPS, *prompts)
    found = kvfold("verify", llama_folder, *words, "--json")
    assert found.code == 0, (found.out, found.err)
    (tmp_path / "vllm.py").write_text("raise RuntimeError('no such instruction here')")
    found = kvfold("verify", llama_folder, *words)
    assert found.code == 1
    assert "no such instruction here" in " ".join(found.out.split())


def test_the_scripts_need_nothing_of_kvfold() -> None:
    folder = Path(__file__).parents[2] / "src" / "kvfold" / "engines" / "scripts"
    scripts = {path.stem for path in folder.glob("*.py")}
    assert {f"verify_{engine.script}" for engine in ENGINES.values()} < scripts
    for path in folder.glob("*.py"):
        assert "import kvfold" not in path.read_text()
        assert "from kvfold" not in path.read_text()


def test_vllm_with_kvfold_is_where_vllm_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In vllm's Python, given or in the environment, unless it has its own."""
    paths = [tmp_path / name for name in ("a", "b", "c", "d")]
    for path in paths:
        path.write_text("")
        path.chmod(0o755)
    theirs, ours, its, its_own = map(str, paths)

    def python(*pythons: str) -> str:
        request = VerifyRequest(source="x", pythons=pythons)
        return request.python_of("vllm+kvfold")

    assert python() == sys.executable
    assert python(f"vllm={theirs}") == theirs
    assert python(f"vllm+kvfold={ours}", f"vllm={theirs}") == ours
    monkeypatch.setenv("KVFOLD_PYTHON_VLLM", its)
    assert python() == its
    assert python(f"vllm={theirs}") == theirs
    monkeypatch.setenv("KVFOLD_PYTHON_VLLM_KVFOLD", its_own)
    assert python(f"vllm={theirs}") == its_own
    assert VerifyRequest(source="x", pythons=(f"vllm+kvfold={ours}",)).python_of("vllm") == its
