"""`winnow calibrate`: settings found for a model, on prompts that it answers unpruned."""
