"""How much of what training changed is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import heal
from kvfold.healing.line import Line, best_share
from kvfold.healing.watch import read_metrics
from tests.toolbox.healing_cases import OPTIONS, same


@pytest.mark.parametrize(
    ("valley", "kept"),
    [(0.0, 0.0), (0.3, 0.25), (0.6, 0.5), (1.0, 1.0), (1.3, 1.25), (1.7, 1.75), (9.0, 2.0)],
)
def test_the_bottom_of_a_valley_is_found(valley: float, kept: float) -> None:
    share, found = best_share(lambda share: abs(share - valley))
    assert share == kept
    assert found == {share: abs(share - valley) for share in found}
    assert {0.0, 1.0} <= found.keys()


def test_where_training_only_did_harm_nothing_of_it_is_kept() -> None:
    """Two valleys: nearer to the trained end it gets better, but never as good as the start."""
    assert best_share(lambda share: 0.0 if share == 0 else 1 + (share - 0.75) ** 2)[0] == 0.0


def test_what_is_no_number_is_not_kept() -> None:
    assert best_share(lambda share: 1.0 if share == 0 else float("nan"))[0] == 0.0


def test_both_ends_of_the_line_are_exact() -> None:
    parameter = torch.nn.Parameter(torch.randn(64))
    start = parameter.detach().clone()
    line = Line([parameter])
    end = torch.randn(64)
    parameter.data.copy_(end)
    line.end()
    for share, wanted in ((2.0, 2 * end - start), (0.5, (start + end) / 2)):
        line.go(share)
        torch.testing.assert_close(parameter.data, wanted, rtol=0, atol=2e-6)  # eps of numbers < 16
    for share, wanted in ((0.0, start), (1.0, end)):
        line.go(share)
        assert torch.equal(parameter.data, wanted)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=str)
def test_no_model_is_worse_for_a_rate_that_was_far_too_high(
    changes: dict[str, Any], source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    if changes:
        pytest.importorskip("peft")
    options = {**OPTIONS, **changes, "train": "attention", "lr": 0.3, "held_out_tokens": 512}
    record = heal(folded, tmp_path / "out", source, [text], **options)
    before, after = (r for r in record["heal"]["quality"] if r["name"] != "source")
    rows = read_metrics(tmp_path / "out/healing.jsonl")
    trained = next(row for row in reversed(rows) if "share" not in row and "kl held-out" in row)
    assert trained["kl held-out"] > before["kl"]  # it did harm
    assert after["kl"] < 1.02 * before["kl"]  # decided on other held-out text
    kept: Any = record["heal"]["kept"]
    assert kept["share"] < 1
    assert kept["kl"][f"{kept['share']:g}"] == min(kept["kl"].values())
    assert rows[-1]["share"] == kept["share"]
    assert rows[-1]["kl held-out"] == pytest.approx(after["kl"], rel=1e-3)


def test_without_held_out_text_all_is_kept(
    healed: Path, source: Path, folded: Path, text: Path, tmp_path: Path
) -> None:
    record = heal(folded, tmp_path / "out", source, [text], **{**OPTIONS, "held_out_tokens": 0})
    assert "kept" not in record["heal"]
    assert not same(tmp_path / "out", folded)
