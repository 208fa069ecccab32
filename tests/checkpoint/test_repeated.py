"""Multi-head attention with repeated KV heads is the same function."""

import pytest
import torch

from kvfold import fold_model
from kvfold.checkpoint.pretrained import built_model
from kvfold.checkpoint.repeated import as_mha
from kvfold.checkpoint.source import Checkpoint, TensorDict
from kvfold.errors import UnsupportedError
from tests.toolbox import tiny


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "gemma2", "qwen3", "granite", "cohere"])
def test_it_is_the_same_function(case: str) -> None:
    model, ids = tiny.make(case), tiny.tokens(2, 20)
    heads = model.config.num_attention_heads
    assert model.config.num_key_value_heads < heads
    source = Checkpoint(case, model.config.to_dict(), TensorDict(model.state_dict()))
    other = built_model(*as_mha(source), torch.float32)
    assert other.config.num_key_value_heads == heads
    with torch.no_grad():
        # The same products, batched otherwise.
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_is_mha_stays() -> None:
    model = tiny.build("gpt2", tiny.GPT2)
    source = Checkpoint("gpt2", model.config.to_dict(), TensorDict(model.state_dict()))
    config, tensors = as_mha(source)
    assert config == source.config
    assert all(torch.equal(tensor, source.tensor(name)) for name, tensor in tensors.items())


def test_a_latent_has_no_heads_to_repeat() -> None:
    model = fold_model(tiny.make("llama"), latent="20+4", layout="youtu", fit="none").model
    source = Checkpoint("mla", model.config.to_dict(), TensorDict(model.state_dict()))
    with pytest.raises(UnsupportedError, match="caches a latent"):
        as_mha(source)
