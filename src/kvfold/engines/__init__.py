"""Engines that serve checkpoints, asked for the tokens that transformers gives."""
