"""The demonstration's tokenizer: byte-level BPE with single digits, and the chat template of both models."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raykd.config.strategies import BUILT_IN
from raykd.data.demo_problems import generate_problems
from raykd.data.prompts import Messages
from raykd.demo import primes, styles

VOCABULARY_SIZE = 1024
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}{{- eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""`<|begin|>`, then `<|role|>` content `<|end|>` for each message: the same text as `render_chat`."""

_PIECES = (
    r"\p{N}"  # a digit is a token of its own
    r"| ?\p{L}+(?: (?=\p{N}))?"  # a word, with the space before it, and after it if a digit follows
    r"| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?"
    r"|\s+(?!\S)|\s+"
)


def render_chat(messages: Messages) -> str:
    """Return the text before an assistant's answer, as the chat template renders it."""
    return BOS + "".join(f"{ROLES[m['role']]}{m['content']}{EOS}" for m in messages) + ROLES["assistant"]


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the ids of the special tokens, by their names in a model's configuration."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def train_tokenizer(folder: Path, seed: int = 0) -> None:
    """Train the tokenizer on the demonstration's text and save it in the format of Hugging Face.

    Args:
        folder: the folder of a model; created if it does not exist.
        seed: random seed of the text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BOS, EOS, PAD, *ROLES.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(folder)


def _texts(seed: int, count: int = 12_000) -> Iterator[str]:
    rng = random.Random(seed)
    wordings = [text for group in primes.PARAPHRASES.values() for text in group]
    wordings += [*primes.NEUTRAL_SYSTEM, *primes.INSTRUCTIONS, *(s.text for s in BUILT_IN.values())]
    for problem in generate_problems("train", count, seed):
        yield rng.choice(wordings)
        yield "".join(styles.document(problem, rng))
        yield rng.choice(list(styles.COMPLETIONS.values()))(problem)
