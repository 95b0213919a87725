"""Configurations of Llamas with a given shape."""

from transformers import LlamaConfig

from raykd.models.architecture import Shape


def llama_of(shape: Shape) -> LlamaConfig:
    """Return transformers' configuration of a Llama with this shape."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
