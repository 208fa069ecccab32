"""Bytes on disk <-> named q, k, v, o projections."""
