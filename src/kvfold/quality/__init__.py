"""How good a folded model still is, measured against its source."""
