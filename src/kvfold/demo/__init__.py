"""The demo: train a small model, fold it, show what it kept."""
