"""What attention and the cache formats are, in plain PyTorch."""
