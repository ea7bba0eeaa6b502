"""Models of the Hugging Face Hub: how they are named, which files are needed, how they come.

They lie in the cache of huggingface_hub, which other programs and processes share.
"""
