"""The people and places of the synthetic data, and which picture shows whom; ``synthetic/benchmarks.py`` writes them."""
