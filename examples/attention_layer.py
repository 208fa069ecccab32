"""One layer as MHA, GQA and MQA: parameters, cache, and a token at a time as all at once.

python examples/attention_layer.py
"""

import torch

import kvfold

torch.manual_seed(0)
x = torch.randn(2, 100, 768)
print(f"{'':4} {'KV heads':>8} {'parameters':>11} {'cache, KiB':>11} {'largest difference':>19}")
for name, kv_heads in (("MHA", 12), ("GQA", 4), ("MQA", 1)):
    layer = kvfold.nn.GroupedQueryAttention(hidden_size=768, num_heads=12, num_kv_heads=kv_heads)
    with torch.no_grad():
        whole = layer(x)
        cache = kvfold.KVCache(kv_heads, 64, batch=2, dtype="fp32", max_length=100)
        steps = [layer(x[:, t : t + 1], cache=cache) for t in range(100)]
    difference = (torch.cat(steps, 1) - whole).abs().max()
    parameters = sum(p.numel() for p in layer.parameters())
    print(f"{name:4} {kv_heads:8} {parameters:11,} {cache.nbytes / 1024:11,.0f} {difference:19.1e}")
