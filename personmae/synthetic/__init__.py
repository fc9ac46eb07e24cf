"""Synthetic data: its people, its scenes, and which image shows whom. ``synthetic/benchmarks.py`` writes it."""
