"""The benchmarks' original prompt formats, so that scores are comparable with published ones.

RULER (arXiv 2404.06654), InfiniteBench (arXiv 2402.13718).  The embedded model is trained on the
same formats (training/tasks.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Template:
    """The text around a context: `opening + context + question + lead`, then the answer.

    lead: the beginning of the answer, which the benchmark puts into the prompt; in a chat it is not
    part of the user's turn.  All three texts may have fields in braces.
    """

    opening: str
    question: str
    lead: str


# One needle of one key.
NEEDLE_ONE = Template(
    "A special magic {noun} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {noun} afterwards.\n",
    "\nWhat is the special magic {noun} for {query} mentioned in the provided text?",
    " The special magic {noun} for {query} mentioned in the provided text is",
)
# Several values of a key, or several keys: {noun} is the plural.
NEEDLE_MANY = Template(
    "Some special magic {noun} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {noun} afterwards.\n",
    "\nWhat are all the special magic {noun} for {query} mentioned in the provided text?",
    " The special magic {noun} for {query} mentioned in the provided text are",
)
NEEDLE = "One of the special magic {noun} for {key} is: {value}."

VARIABLES = Template(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables"
    " are assigned the value {query}, they are: ",
)

# Not from a benchmark: the value at the end of a chain.
CHAIN = Template(
    "",
    "\nQuestion: What is the value of VAR {query}?",
    " Answer: VAR {query} = ",
)

COMMON_WORDS = Template(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)

FREQUENT_WORDS = Template(
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)

DOCUMENTS = Template(
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n",
    "\n\nAnswer the question based on the given documents. Only give me the answer and do not "
    "output any other words.\n\nQuestion: {query}",
    " Answer:",
)

PASSKEY = Template(
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n\n",
    "\n\nWhat is the pass key?",
    "\n\nThe pass key is",
)
PASSKEY_NEEDLE = "The pass key is {value}. Remember it. {value} is the pass key."

NUMBER_STRING = Template(
    "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you "
    "about the important information there.\n\n",
    "\n\nWhat is the sequence of digits?",
    "\n\nThe sequence of digits is",
)
NUMBER_STRING_NEEDLE = (
    "The sequence of digits is {value}. Remember it. {value} is the sequence of digits."
)

KEY_VALUE = Template(
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    "JSON data:\n",
    '\n\nKey: "{query}"',
    "\nThe value associated with the specified key is: ",
)

MATH_FIND = Template(
    "What is the {what} number in the following list?\n\n",
    "\n\nYou should answer with only one number, no other words.",
    " The {what} number of the list is: ",
)
