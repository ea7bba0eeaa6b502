"""Trains `models/winnow-tiny` from scratch: data, tokenizer, model, curriculum, evaluation.

Run `python -m training.train`; it resumes from `runs/` and exports after every stage.
"""
