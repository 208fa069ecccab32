"""Norms of queries and keys behind folded heads: what they see stays what they saw."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import heal
from kvfold.checkpoint.pretrained import built_model
from kvfold.checkpoint.repeated import as_mha
from kvfold.fold.model import fold_model
from kvfold.fold.norms import norm_of
from tests.toolbox import tiny
from tests.toolbox.healing_cases import OPTIONS, weights

WIDE = ("olmo2", "olmo3", "olmoe", "flex_olmo")
BY_HEAD = ("qwen3", "gemma3_text", "exaone4", "glm4_moe-norm")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uneven(case: str, seed: int = 3) -> Any:
    """A model whose norms' weights all differ."""
    model = tiny.make(case)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def forms(products: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[N, X, X]``: what the mean square of ``[N, n, X]`` behind a norm is of an input."""
    rows = products / weight[:, None]
    return rows.mT @ rows / rows.shape[1]


def test_any_number_of_norms_share_their_weights() -> None:
    rows, weight = noise(5, 6, 40), torch.rand(6, dtype=torch.float64) + 0.5
    found = norm_of(weight[:, None] * rows, rows, torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(found, weight)


def test_the_moment_of_inputs_counts() -> None:
    """Where inputs never go, rows may differ."""
    rows, moment = noise(1, 4, 12), torch.ones(12, dtype=torch.float64)
    moment[6:] = 0
    products = torch.cat([rows[..., :6], noise(1, 4, 6, seed=1)], -1)
    for each in (moment, torch.diag(moment)):
        torch.testing.assert_close(norm_of(products, rows, each), torch.ones(4).double())


@pytest.mark.parametrize("seed", range(8))
def test_what_has_no_exact_split_is_as_near_as_any_share_alike(seed: int) -> None:
    """And no weight is a giant: within twice that of equal shares, as the source has them."""
    products, rows = noise(3, 8, 20, seed=seed), noise(3, 10, 20, seed=seed + 100)
    rows /= rows.norm(dim=-1, keepdim=True)
    found = norm_of(products, rows, torch.ones(20, dtype=torch.float64))
    equal = products.square().sum(-1).mean(0).sqrt()
    assert float((found / equal).max()) <= 2 + 1e-9
    wanted = rows.mT @ rows / rows.shape[1]
    errors = [(forms(products, w) - wanted).square().sum() for w in (found, equal)]
    assert errors[0] <= errors[1]


def test_rows_of_zeros_count_in_the_mean() -> None:
    rows = noise(1, 4, 12)
    products = torch.cat([rows, torch.zeros_like(rows)], 1)
    weight = norm_of(products, rows, torch.ones(12, dtype=torch.float64))
    assert bool(weight.isfinite().all())
    torch.testing.assert_close(forms(products, weight), rows.mT @ rows / 4)


@pytest.mark.parametrize("case", BY_HEAD)
def test_copies_behind_uneven_norms_fold_back(case: str) -> None:
    model, ids = uneven(case), tiny.tokens()
    hidden = tiny.hidden_mha(model)
    for windows in (None, tiny.tokens(8, 32, seed=5)):
        folded = fold_model(hidden, model.config.num_key_value_heads, "pca", "none", windows)
        torch.testing.assert_close(
            tiny.logits(folded.model, ids), tiny.logits(model, ids), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("case", BY_HEAD)
def test_averages_leave_norms_as_they_are(case: str) -> None:
    model = uneven(case)
    for method, same in (("mean", True), ("first", True), ("pca", False)):
        folded = fold_model(model, 1, method, "none").model
        for name, tensor in model.state_dict().items():
            if name.endswith("k_norm.weight"):
                assert torch.equal(folded.state_dict()[name], tensor) == same


@pytest.mark.parametrize("case", WIDE)
def test_norms_over_all_heads_are_written_as_they_shrink(case: str) -> None:
    model = tiny.make(case)
    folded = fold_model(model, 1, "pca", "local", tiny.tokens(16, 32, seed=5))
    attention = folded.model.model.layers[0].self_attn
    assert attention.k_norm.weight.shape == (attention.head_dim,)
    assert attention.q_norm.weight.shape == model.model.layers[0].self_attn.q_norm.weight.shape
    for report in folded.record:
        assert report["stages"][-1]["error_after"] < report["stages"][0]["error_before"]


@pytest.mark.parametrize("case", WIDE)
def test_repeated_heads_are_the_same_function(case: str) -> None:
    model, ids = tiny.make(case), tiny.tokens()
    repeated = built_model(*as_mha(tiny.checkpoint_of(model)), torch.float32)
    assert repeated.config.num_key_value_heads == model.config.num_attention_heads
    torch.testing.assert_close(
        tiny.logits(repeated, ids), tiny.logits(model, ids), atol=1e-5, rtol=0
    )


def test_norms_over_all_heads_are_healed(tmp_path: Path) -> None:
    source = tiny.save_with_tokenizer(tiny.make("olmo2"), tmp_path / "source")
    model = fold_model(tiny.make("olmo2"), 1, "pca", "none", tiny.tokens(8, 32)).model
    folded = tiny.save_with_tokenizer(model, tmp_path / "folded")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny.words(300, seed) for seed in range(40)))
    heal(folded, tmp_path / "healed", source, [text], **OPTIONS)
    before, after = (weights(tmp_path / name) for name in ("folded", "healed"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert not torch.equal(*(w["model.layers.0.self_attn.k_norm.weight"] for w in (before, after)))
