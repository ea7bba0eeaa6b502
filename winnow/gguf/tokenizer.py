"""A GGUF file's tokenizer. Transformers builds it; what it leaves out of the file is added here."""

import json
import logging

from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
)

from winnow.errors import UnusableModel
from winnow.gguf import vocabulary
from winnow.gguf.header import Header

logger = logging.getLogger(__name__)

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
# How the text of a byte-level vocabulary is split before it is merged, by the file's word for it
# (tokenizer.ggml.pre; llama.cpp's src/llama-vocab.cpp says what each stands for). Transformers
# takes every word that it does not know for GPT-2's way.
_AS_GPT2 = frozenset(
    {
        *("default", "gpt-2", "phi-2", "olmo", "jais", "mpt", "mellum", "modern-bert", "exaone4"),
        *("roberta-bpe", "gigachat", "a.x-4.0"),
    }
)
_DIGITS_APART = frozenset(  # and the rest as GPT-2
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
_AS_OTHERS = {"chatglm-bpe": "llama3", "glm4": "llama3", "stablelm2": "qwen2", "hunyuan": "qwen2"}
# With these a word that is a token is that token, and a prompt begins with one that says so.
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})


def gguf_tokenizer(header: Header) -> PreTrainedTokenizerFast:
    """Raises UnusableModel for a kind, or a way to split text, that is not known."""
    values = vocabulary.tokenizer_values(header)
    kind = values.get("tokenizer_type")
    if kind not in (_BYTE_LEVEL, _SENTENCEPIECE):
        raise UnusableModel(
            f"{header.path} has a tokenizer of kind {kind}; Winnow reads {_BYTE_LEVEL} (byte-level "
            f"BPE) and {_SENTENCEPIECE} (SentencePiece BPE)"
        )
    split = _known_split(header) if kind == _BYTE_LEVEL else ""
    values["pre_tokenizer_type"] = _AS_OTHERS.get(split, split)
    backend, _ = convert_gguf_tokenizer(header.architecture, values)
    backend = _without_others(backend, len(values["tokens"]))
    if kind == _BYTE_LEVEL:
        _set_byte_level(backend, split)
    elif not vocabulary.adds_space(header):
        _leave_out_space(backend)
    begins = kind == _SENTENCEPIECE or split in _WHOLE_WORDS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=vocabulary.adds_token(header, "bos", default=begins),
        add_eos_token=vocabulary.adds_token(header, "eos", default=False),
        chat_template=vocabulary.chat_templates(header) or None,
        **{"bos_token": None, "eos_token": None, **vocabulary.special_tokens(header)},
    )


def _known_split(header: Header) -> str:
    split = vocabulary.split_name(header)
    if split is None:
        logger.warning("%s does not say how its text is split; it is split as GPT-2's", header.path)
        return "default"
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_AS_GPT2, *_DIGITS_APART, *_AS_OTHERS}
    if split not in known:
        raise UnusableModel(
            f"{header.path} splits text in the way of {split}, which Winnow does not know; known "
            f"are {', '.join(sorted(known))}"
        )
    return split


def _without_others(backend: Tokenizer, num_tokens: int) -> Tokenizer:
    """Takes out what transformers' class adds of its own, like GPT-2's <|endoftext|>.

    A text with it would have a token that the model lacks.
    """
    if all(token_id < num_tokens for token_id in backend.get_added_tokens_decoder()):
        return backend
    content = json.loads(backend.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] < num_tokens]
    return Tokenizer.from_str(json.dumps(content))


def _set_byte_level(backend: Tokenizer, split: str) -> None:
    if split in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if split in _WHOLE_WORDS:
        backend.model.ignore_merges = True


def _leave_out_space(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
