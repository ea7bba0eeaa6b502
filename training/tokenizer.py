"""The tokenizer: byte-level BPE with 1,024 tokens, one token per digit, five special tokens.

The chat template is here too, because training renders its conversations with the same tokens.
"""

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from evals.prose import pick_style
from training.tasks import CHAINS, KINDS, KeySource, make_fact

VOCAB_SIZE = 1024
MAX_POSITIONS = 8192

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

CHAT_TEMPLATE = (
    "{% if tools %}"
    "{{ '<|system|>You can call these functions:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    '{{ \'\\n</tools>\\nTo call one, write <tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n'
    "</tool_call><|end|>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>\\n' + message['content'] + '\\n</tool_response><|end|>' }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message['tool_calls'] %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{% set arguments = call['function']['arguments'] %}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ arguments if arguments is string else arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _corpus(seed: int, num_texts: int) -> Iterator[str]:
    """Texts without variables, so that each letter of a variable's name keeps its own token."""
    rng = random.Random(f"tokenizer-{seed}")
    kinds = [kind for kind in KINDS if kind not in CHAINS]
    for _ in range(num_texts):
        make_sentence, keys = pick_style(rng), KeySource(rng)
        fact = make_fact(rng.choice(kinds), rng, keys, size=0.1)
        question = rng.choice(fact.questions)
        filler = (make_sentence(rng) for _ in range(8))
        texts = (*filler, *fact.statements, question.asked, question.lead, *question.wordings)
        yield " ".join((*texts, "\nQuestion:", "VAR = VAR", "\nAnswer:"))


def train_tokenizer(seed: int, num_texts: int = 20_000) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `num_texts` generated texts; every byte has its own token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            # Each letter of a variable's name is a token, with or without a space before it.
            pre_tokenizers.Split(Regex("VAR|(?<=[A-Z])[A-Z]|[A-Z](?=[A-Z])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(seed, num_texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
