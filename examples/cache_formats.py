"""What each cache format costs in bytes and in error: one layer, 4,096 tokens, 8 KV heads of 128.

Random values average out, so the errors look larger than they are in a model; their order is real.

python examples/cache_formats.py
"""

import torch

import kvfold

torch.manual_seed(0)
k, v = torch.randn(1, 8, 4096, 128), torch.randn(1, 8, 4096, 128)
k[..., :4] *= 8  # real keys have a few large dimensions, which is what makes INT4 hard
q = torch.randn(1, 32, 1, 128)
exact = kvfold.attention(q, k, v)

print(f"{'format':12} {'MiB':>6} {'error':>8}")
for dtype in ("fp32", "bf16", "fp8", "int8", ("int8", "int4"), "int4"):
    cache = kvfold.KVCache(8, 128, dtype=dtype, max_length=4096)
    cache.append(k, v)
    error = (cache.attend(q) - exact).norm() / exact.norm()
    name = dtype if isinstance(dtype, str) else " + ".join(dtype)
    print(f"{name:12} {cache.nbytes / 2**20:6.1f} {error:8.2%}")
