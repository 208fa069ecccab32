"""Memory and speed from ``config.json`` and safetensors headers alone. No torch."""
