"""Random Llama: models of Llama's architecture with random weights, for timing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

# By the approximate number of parameters in millions.
SHAPES: dict[int, dict[str, Any]] = {
    33: {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    300: {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16},
}
VOCABULARY = 8192
CONTEXT = 1024


def write(folder: Path, millions: int, texts: Iterable[str]) -> Path:
    """Write a bfloat16 model whose tokenizer is trained on `texts` and padded to `VOCABULARY` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[millions],
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    # The end token becomes improbable, so that all answers reach the token limit.
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(texts: Iterable[str]) -> Any:
    """Return a byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|pad|>", "<|turn|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet),  # pyright: ignore[reportCallIssue]
    )
    bpe.add_tokens(
        [f"\N{MATHEMATICAL LEFT ANGLE BRACKET}{number}" for number in range(VOCABULARY - bpe.get_vocab_size())]
    )
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[2], additional_special_tokens=[special[1]]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    return tokenizer


def num_parameters(folder: Path) -> int:
    """Return the number of weights in a model's folder."""
    import safetensors

    total = 0
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as weights:  # pyright: ignore[reportPrivateImportUsage]
            total += sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    return total
