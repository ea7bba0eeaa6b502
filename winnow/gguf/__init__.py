"""GGUF files, as llama.cpp writes them: a model's configuration, vocabulary and weights in one."""

SUFFIX = ".gguf"
