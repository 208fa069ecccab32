"""The CPU kernels: C++ sources, and what builds, loads and calls them."""
