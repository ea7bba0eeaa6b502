"""LoRA adapters of one model: what they are, and the layers' products with them.

A sequence without an adapter gets exactly the model's own numbers.
"""
