"""The tables of the benchmarks' pages, a file for each subject; ``tables.py`` places them."""
