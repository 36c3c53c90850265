"""Benchmarks: what is measured beside PyTorch, how, and how it is reported. `python -m fastnets bench` runs them."""
