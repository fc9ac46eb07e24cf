"""The people and places of the synthetic data, and which picture shows whom; ``data/synthetic.py`` writes them."""
