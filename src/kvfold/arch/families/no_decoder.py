"""What has no decoder that keeps keys and values, and people will try all the same."""

from kvfold.arch.family import Family

FAMILIES = (
    Family(
        ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
        unlisted_layers=lambda config, count: ["recurrent"] * count,
        unfoldable="it has no attention",
    ),
    Family(("bert",), unfoldable="it is an encoder; kvfold folds decoders, which keep a KV cache"),
    Family(("t5",), unfoldable="it is an encoder-decoder; kvfold folds decoder-only models"),
)
