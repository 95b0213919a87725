"""Random Llama: models with a common architecture and random weights, to be timed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

# By about how many million parameters they have.
SHAPES: dict[int, dict[str, Any]] = {
    33: {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    300: {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16},
}
VOCABULARY = 8192
CONTEXT = 1024


def write(folder: Path, millions: int, texts: Iterable[str]) -> Path:
    """Writes a model in bfloat16, whose tokenizer was trained on texts and is filled up to `VOCABULARY`.

    What such a model writes means nothing, but each of its tokens costs what a token costs.
    """
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
    # As good as never an end: all answers are as long as they may be.
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level BPE with Llama's turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|pad|>", "<|turn|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet),  # pyright: ignore[reportCallIssue]
    )
    made.add_tokens(
        [f"\N{MATHEMATICAL LEFT ANGLE BRACKET}{number}" for number in range(VOCABULARY - made.get_vocab_size())]
    )
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[0], eos_token=special[2], additional_special_tokens=[special[1]]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    return tokenizer


def num_parameters(folder: Path) -> int:
    """How many weights there are."""
    import safetensors

    total = 0
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as weights:  # pyright: ignore[reportPrivateImportUsage]
            total += sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    return total
