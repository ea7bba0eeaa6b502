"""Weights as int8 in memory, and checkpoints whose weights are quantized."""
