"""The command line. Starting up imports neither torch nor transformers."""
