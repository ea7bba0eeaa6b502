"""How `models/winnow-tiny` is made from nothing: data, tokenizer, model, curriculum, evaluation.

Run `python -m training.train`; it resumes from `runs/` and exports after every stage.
"""
