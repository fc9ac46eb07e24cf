"""Encoders as people use them: loaded for features, and read from the weights of other projects.

Torch, files and no configuration. Nothing here knows an engine, and nothing needs DeepSpeed or streaming.
"""
