"""From many KV heads to few."""
