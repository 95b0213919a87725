"""Answers and log-probabilities computed by transformers alone, as reference values."""

import torch


def greedy(model, prompt: list[int], eos: int, max_tokens: int) -> list[int]:
    """Return a model's greedy answer, computed by transformers."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    return out[0, len(prompt) :].tolist()


def log_likelihoods(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the model's log-probabilities at each token of an answer: (T, V) float64, at temperature 1."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)
