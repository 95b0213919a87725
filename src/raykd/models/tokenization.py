"""Tokenize prompts and answers, and check that they fit the context length."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig

from raykd.config.sections import Protocol
from raykd.data import prompts
from raykd.errors import UserError
from raykd.models.architecture import max_positions
from raykd.models.builtin import resolve_model
from raykd.models.loading import Model, _template, load_config, load_tokenizer

# Some chat templates (Llama 3.2's) tell the model the date, by default that of the day: the same question would be
# another one tomorrow. This is what Llama 3.1's template says.
DATE_STRING = "26 Jul 2024"


def end_token_ids(named: Model) -> set[int]:
    """The tokens that end an answer, by the tokenizer and by the model's generation configuration."""
    tokenizer = load_tokenizer(named)
    try:
        revision = named.revision or "main"
        ends = GenerationConfig.from_pretrained(resolve_model(named.model), revision=revision).eos_token_id
    except OSError:
        # Not every model has one.
        ends = None
    found: list[int | None] = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    return {token for token in found if token is not None}


def answer_token_ids(tokenizer: Any, text: str, is_whole: bool) -> list[int]:
    """The tokens of an answer that somebody else wrote.

    Args:
        tokenizer: of the model that is to give it.
        text: the answer.
        is_whole: whether it ends there; one that was cut must not teach to end where it was cut.
    """
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*tokens, tokenizer.eos_token_id] if is_whole else tokens


def context_length(named: Model, engine_kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens an engine takes, prompt and answer together; None where the model does not say."""
    told = engine_kwargs.get("max_model_len")
    # By -1 vLLM takes as many as there is room for, up to the model's own.
    return told if told and told != -1 else max_positions(load_config(named).get_text_config().to_dict())


def check_lengths(
    needs: Iterable[tuple[str, int]], total: int, limit: int, max_error_rate: float, whose: str, engine: str, also: str
) -> None:
    """Raises UserError where more prompts than may fail leave a model no room to answer, naming some.

    Args:
        needs: what may need more than the model's context: the problem, and how many tokens prompt and answer take.
        total: how many prompts there are.
        limit: the context's tokens.
        max_error_rate: the share of them that may be too long.
        whose: what is asked, for the message.
        engine: the section of the engine that answers.
        also: what else can be shortened.
    """
    long = [(name, tokens) for name, tokens in needs if tokens > limit]
    if len(long) > max_error_rate * total:
        shown = ", ".join(f"{name} with {tokens}" for name, tokens in long[:3])
        raise UserError(
            f"{whose}: {len(long)} of {total} prompts with their answers do not fit into {limit} tokens ({shown}); "
            f"raise {engine}.engine_kwargs.max_model_len, or lower {also}"
        )


def prompt_token_ids(tokenizer: Any, messages: prompts.Messages) -> list[int]:
    """The tokens of a conversation by the model's own chat template, up to where the assistant begins."""
    with _template(tokenizer):
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, date_string=DATE_STRING
        )
    return list(encoded["input_ids"])


def question_token_ids(tokenizer: Any, problem: Mapping[str, Any], instruction: str, protocol: Protocol) -> list[int]:
    """The tokens of a problem as a student is asked it.

    Args:
        tokenizer: the student's.
        problem: a row with at least `question`.
        instruction: what is said about the form of the answer.
        protocol: how it is asked; `zero_shot_chat` as in training.
    """
    messages = prompts.student_messages(problem, instruction, prompts.protocol_exemplars(protocol))
    if protocol == "zero_shot_raw":
        return list(tokenizer(prompts.raw_prompt(messages))["input_ids"])
    return prompt_token_ids(tokenizer, messages)


def question_text(tokenizer: Any, problem: Mapping[str, Any], instruction: str, protocol: Protocol) -> str:
    """What `question_token_ids` are the tokens of."""
    messages = prompts.student_messages(problem, instruction, prompts.protocol_exemplars(protocol))
    return prompts.raw_prompt(messages) if protocol == "zero_shot_raw" else prompt_text(tokenizer, messages)


def prompt_text(tokenizer: Any, messages: prompts.Messages) -> str:
    """What `prompt_token_ids` are the tokens of."""
    with _template(tokenizer):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, date_string=DATE_STRING
        )
