"""Attention maps: those of transformers' eager attention, in bounded memory."""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import fold_model
from kvfold.errors import InputError
from kvfold.report import look as drawing
from kvfold.report import maps
from kvfold.report.maps import divergences, look, pooled
from tests.conftest import Kvfold
from tests.toolbox import tiny
from tests.toolbox.largest import Largest


def eager(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model(ids[None], output_attentions=True).attentions[layer][0]
    return found


@pytest.mark.parametrize("case", ["llama", "llama-odd", "gemma2", "qwen3", "phi", "mistral"])
def test_maps_are_those_of_eager_attention(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, softcaps and norms included; some queries at a time."""
    monkeypatch.setattr(maps, "ROWS", 7)
    model, ids = tiny.make(case), tiny.tokens(1, 24)[0]
    for layer in (0, 1):
        seen = look(model, ids, [layer])[layer]
        found = torch.cat([weights for _, weights in seen.weights()], 1)
        torch.testing.assert_close(found, eager(model, ids, layer), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled(seen), found, rtol=1e-4, atol=1e-6)


def test_models_that_cannot_be_folded_can_be_looked_at() -> None:
    config = {**tiny.COMMON, "num_attention_heads": 4}
    config.pop("num_key_value_heads")
    model, ids = tiny.build("gpt_neox", config), tiny.tokens(1, 12)[0]
    seen = look(model, ids, [1])[1]
    assert seen.group_size == 1
    torch.testing.assert_close(pooled(seen), eager(model, ids, 1), rtol=1e-4, atol=1e-5)


def test_bins_keep_the_weight() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 50)[0]
    seen = look(model, ids, [0])[0]
    found = pooled(seen, bins=8)
    assert found.shape == (6, 8, 8)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, 8))
    exact = torch.cat([weights for _, weights in seen.weights()], 1)
    place = torch.arange(50) * 8 // 50
    corner = exact[:, place == 7][:, :, place == 0].sum(-1).mean(-1)
    torch.testing.assert_close(found[:, 7, 0], corner)


def test_divergence_is_nothing_for_the_same_model_and_something_after_folding() -> None:
    model, ids = tiny.make("llama", num_key_value_heads=6), tiny.tokens(1, 20)[0]
    folded = fold_model(model, 1, "mean", "none").model
    source, other = look(model, ids, [0])[0], look(folded, ids, [0])[0]
    assert float(divergences(source, source).abs().max()) < 1e-6
    apart = divergences(source, other)
    assert bool((apart > 1e-3).all())
    p, r = (torch.cat([w for _, w in s.weights()], 1).double() for s in (source, other))
    truth = torch.where(p > 0, p * (p / r).log(), 0.0).sum((1, 2)) / 20
    torch.testing.assert_close(apart.double(), truth, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="cannot be compared"):
        divergences(source, look(model, ids[:9], [0])[0])


def test_the_map_of_all_tokens_by_all_tokens_never_exists() -> None:
    tokens = 1024
    model = tiny.make("llama", max_position_embeddings=tokens)
    seen = look(model, tiny.tokens(1, tokens)[0], [0])[0]
    with Largest() as largest:
        pooled(seen)
        divergences(seen, seen)
    assert largest.numel <= 6 * maps.ROWS * tokens < 6 * tokens * tokens


@pytest.mark.parametrize("heads", [1, 2, 3, 9, 14, 32, 40])
@pytest.mark.parametrize("models", [1, 2])
def test_maps_fill_the_picture_and_none_covers_another(heads: int, models: int) -> None:
    page = drawing._Page(heads, models, drawing._columns(heads), drawing._MARGIN)
    places = [page.place(head, number) for head in range(heads) for number in range(models)]
    edges = [
        (left, bottom, left + width, bottom + height) for left, bottom, width, height in places
    ]
    assert all(0 < a < c <= 1 and 0 < b < d < 1 for a, b, c, d in edges)
    for (a, b, c, d), (e, f, g, h) in combinations(edges, 2):
        assert c <= e or g <= a or d <= f or h <= b
    assert max(c for _, _, c, _ in edges) > 0.95
    inches = {(round(w * drawing._WIDTH, 6), round(h * page.height, 6)) for _, _, w, h in places}
    assert inches == {(round(page.side, 6),) * 2}


@pytest.mark.parametrize("words", [1, 12, 33, 64, 65])
def test_words_are_as_many_as_can_be_read(words: int) -> None:
    side = 2.0
    shown = sorted(drawing._some(["a" * 30] * words, side))
    room = side / words * 72 * min((b - a for a, b in pairwise(shown)), default=words)
    assert room >= 1.1 * drawing._LETTERS  # points from one line of letters to the next
    assert bool(shown) == (words <= drawing._MOST_WORDS)


def test_the_model_is_left_as_it_was() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 9)[0]
    before = model.config._attn_implementation
    look(model, ids, [0, 1])
    assert model.config._attn_implementation == before
    assert not [m for m in model.modules() if hasattr(m, "kvfold_listener")]


def test_the_command(kvfold: Kvfold, llama_folder: Path, tmp_path: Path) -> None:
    kvfold("convert", llama_folder, tmp_path / "folded", "--kv-heads", 2, "--no-calibration")
    png, page = tmp_path / "a.png", tmp_path / "a.html"
    arguments = ["look", llama_folder, "w3 w4 w5 w6", "--against", tmp_path / "folded"]
    run = kvfold(*arguments, "--png", png, "--html", page)
    assert run.code == 0, run.err
    assert "weights diverge by" in run.out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page.read_text()
    assert kvfold(*arguments, "--png", png).code == 2  # it exists already
    two = kvfold(*arguments, "--png", png, "--force", "--layer", 0, "--layer", 1)
    assert two.code == 0, two.err
    assert (tmp_path / "a-0.png").is_file()
    assert (tmp_path / "a-1.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", 9], "layers 0 to 1"),
        (["text", "--file", "x"], "exclude each other"),
        ([" "], "the text is empty"),
    ],
)
def test_bad_input(
    options: list[object], message: str, kvfold: Kvfold, llama_folder: Path, tmp_path: Path
) -> None:
    run = kvfold("look", llama_folder, *options, "--png", tmp_path / "a.png")
    assert run.code == 2
    assert message in run.err
    assert not list(tmp_path.iterdir())
