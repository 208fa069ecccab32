"""One timing function, the cases, the peers."""
