"""Checkpoints served through vLLM, with kvfold's attention and with its own."""
