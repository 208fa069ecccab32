"""Training a folded model until it is like its source again."""
