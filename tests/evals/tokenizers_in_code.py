"""Tokenizers that count differently once texts are joined, built in code."""

from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

from evals.prose import documentation_sentences, noise
from evals.tasks.base import CountTokens

# Punctuation takes the line breaks after it into one token, as in Llama 3's tokenizer.
_BREAKS_JOIN_PUNCTUATION = r"\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+| "


def counter(pre_tokenizer: pre_tokenizers.PreTokenizer) -> CountTokens:
    """Counts tokens of a small BPE over these pre-tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [*documentation_sentences()[:300], *[f"{next(noise())}\n"] * 20]
    tokenizer.train_from_iterator(lines, trainer)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def line_break_joining() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_BREAKS_JOIN_PUNCTUATION), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def prefix_adding() -> pre_tokenizers.PreTokenizer:
    """Every text begins with a blank, as in SentencePiece."""
    return pre_tokenizers.ByteLevel(add_prefix_space=True)
