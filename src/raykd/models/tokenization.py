"""Tokenize prompts and answers, and check that they fit the context length."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig

from raykd.config.sections import Protocol
from raykd.data import prompts
from raykd.errors import UserError
from raykd.models.architecture import max_positions
from raykd.models.builtin import resolve_model
from raykd.models.loading import Model, load_config, load_tokenizer, template_errors

# Llama 3.2's chat template puts the current date into the prompt, which would change prompts from day to day. This date
# is the default of Llama 3.1's template.
DATE_STRING = "26 Jul 2024"


def end_token_ids(model: Model) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model's generation configuration."""
    tokenizer = load_tokenizer(model)
    try:
        revision = model.revision or "main"
        eos_token_id = GenerationConfig.from_pretrained(resolve_model(model.model), revision=revision).eos_token_id
    except OSError:
        # Not every model has a generation_config.json.
        eos_token_id = None
    configured = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return {token for token in (tokenizer.eos_token_id, *configured) if token is not None}


def answer_token_ids(tokenizer: Any, text: str, is_whole: bool) -> list[int]:
    """Return the tokens of an answer that is given as text.

    Args:
        tokenizer: the tokenizer of the model that learns or scores the answer.
        text: the answer.
        is_whole: whether to add the end token; a truncated answer must not teach the model to end there.
    """
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*tokens, tokenizer.eos_token_id] if is_whole else tokens


def context_length(model: Model, engine_kwargs: Mapping[str, Any]) -> int | None:
    """Return an engine's context length in tokens, prompt and answer together; None where the model has no limit."""
    max_model_len = engine_kwargs.get("max_model_len")
    # With -1 vLLM chooses the length by the free memory, up to the model's own limit.
    if max_model_len and max_model_len != -1:
        return max_model_len
    return max_positions(load_config(model).get_text_config().to_dict())


def check_lengths(
    lengths: Iterable[tuple[str, int]],
    total: int,
    limit: int,
    max_error_rate: float,
    model: str,
    engine: str,
    remedy: str,
) -> None:
    """Check that prompts with their answers fit the context length.

    Args:
        lengths: problem ids, and the most tokens of prompt and answer together.
        total: number of prompts.
        limit: context length in tokens.
        max_error_rate: most prompts that may be too long, as a share.
        model: the model that answers, for the message.
        engine: path of the engine's section in the configuration.
        remedy: settings that shorten prompts or answers, for the message.

    Raises:
        UserError: more prompts than that are too long; the message names some.
    """
    too_long = [(problem_id, tokens) for problem_id, tokens in lengths if tokens > limit]
    if len(too_long) > max_error_rate * total:
        examples = ", ".join(f"{problem_id} with {tokens}" for problem_id, tokens in too_long[:3])
        raise UserError(
            f"{model}: {len(too_long)} of {total} prompts with their answers do not fit into {limit} tokens "
            f"({examples}); raise {engine}.engine_kwargs.max_model_len, or lower {remedy}"
        )


def prompt_token_ids(tokenizer: Any, messages: prompts.Messages) -> list[int]:
    """Return the tokens of a conversation by the model's chat template, up to the start of the assistant's turn."""
    with template_errors(tokenizer):
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, date_string=DATE_STRING
        )
    return list(encoded["input_ids"])


def question_token_ids(tokenizer: Any, problem: Mapping[str, Any], instruction: str, protocol: Protocol) -> list[int]:
    """Return the tokens of a student's prompt.

    Args:
        tokenizer: the student's.
        problem: a row with at least `question`.
        instruction: the instruction on the form of the answer.
        protocol: the evaluation protocol; `zero_shot_chat` is the form of training.
    """
    messages = prompts.student_messages(problem, instruction, prompts.protocol_exemplars(protocol))
    if protocol == "zero_shot_raw":
        return list(tokenizer(prompts.raw_prompt(messages))["input_ids"])
    return prompt_token_ids(tokenizer, messages)


def question_text(tokenizer: Any, problem: Mapping[str, Any], instruction: str, protocol: Protocol) -> str:
    """Return the text whose tokens `question_token_ids` returns."""
    messages = prompts.student_messages(problem, instruction, prompts.protocol_exemplars(protocol))
    return prompts.raw_prompt(messages) if protocol == "zero_shot_raw" else prompt_text(tokenizer, messages)


def prompt_text(tokenizer: Any, messages: prompts.Messages) -> str:
    """Return the text whose tokens `prompt_token_ids` returns."""
    with template_errors(tokenizer):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, date_string=DATE_STRING
        )
