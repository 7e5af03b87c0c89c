"""Benchmarks by lm-eval: of exported folders, and of the model in training."""
