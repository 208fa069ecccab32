"""The version of kvfold."""

__version__ = "0.1.0"
