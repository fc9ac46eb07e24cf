"""The people and places of the synthetic data, and which image shows whom; ``synthetic/benchmarks.py`` writes them."""
