"""Every family that vLLM and a tiny model of it know: the same tokens as its own backend."""

from pathlib import Path

import pytest

from tests.toolbox.vllm_cases import OURS, OWN, needs_vllm
from tests.toolbox.vllm_engines import (
    MODELS,
    backends_of,
    engine,
    greedy,
    prompts,
    sampled,
    tiny_folder,
)

pytestmark = [pytest.mark.real, needs_vllm]


GIVEN = prompts(5, 40, 90)


@pytest.mark.parametrize("case", MODELS)
def test_the_same_tokens(case: str, tmp_path: Path) -> None:
    """The likeliest ones, and drawn ones, as some of these models say one word again and again."""
    folder, found = tiny_folder(tmp_path, case), {}
    for backend in (OWN, OURS):
        with engine(folder, backend) as llm:
            assert backends_of(llm) == {backend}
            found[backend] = greedy(llm, GIVEN), sampled(llm, GIVEN, temperature=1.0, seed=1)
    assert found[OURS] == found[OWN]
    assert all(len(set(text)) >= 8 for [text] in found[OWN][1]), "too little is said to compare"
