"""Models: found on disk or on the hub, identified, and their tokenizers compared."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from raykd import prompts, protocols, storage
from raykd.demo import resolve_model
from raykd.faults import UserError, as_user_error
from raykd.sections import Protocol, Student, Teacher
from raykd.shapes import positions

Model = Teacher | Student

# Some chat templates (Llama 3.2's) tell the model the date, by default that of the day: the same question would be
# another one tomorrow. This is what Llama 3.1's template says.
DATE_STRING = "26 Jul 2024"


def identify(named: Model) -> dict[str, str]:
    """What identifies a model's weights and tokenizer: the folder's content, or the hub's commit.

    Raises:
        UserError: where the model can neither be found on disk nor on the hub.
    """
    if isinstance(named, Teacher) and named.is_sent_messages:
        # Whatever the server has under that name.
        return {"model": named.model, "revision": named.revision or "unknown"}
    model, path = named.model, Path(resolve_model(named.model))
    if path.is_dir():
        return {"model": model, "revision": storage.fingerprint(path)}
    try:
        load_config(named)
    except OSError as error:
        raise UserError(_nowhere(named, error)) from None
    return {"model": model, "revision": _commit(model, named.revision) or named.revision or "unknown"}


def _commit(model: str, revision: str | None) -> str | None:
    """The commit of the hub whose `config.json` was loaded; a branch, which is what was asked for, may move."""
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    # The cache keeps each commit's files in a folder that is named by it.
    return Path(cached).parent.name if isinstance(cached, str) else None


def load_config(named: Model) -> Any:
    """The configuration of a model.

    Raises:
        UserError: where it cannot be read, or needs code of its own that is not trusted.
    """
    return _load(AutoConfig, named)


def load_tokenizer(named: Model) -> Any:
    """The tokenizer of a model, which must have a chat template.

    Raises:
        UserError: where it has none, cannot be read, or needs code of its own that is not trusted.
    """
    tokenizer = _load(AutoTokenizer, named)
    if not tokenizer.chat_template:
        raise UserError(f"model {named.model!r} has no chat template; use an instruct model")
    return tokenizer


def teacher_tokenizer(teacher: Teacher) -> Any:
    """The teacher's tokenizer; None where it is sent messages, and nothing of it need be here."""
    return None if teacher.is_sent_messages else load_tokenizer(teacher)


def _load(kind: Any, named: Model) -> Any:
    try:
        return kind.from_pretrained(
            resolve_model(named.model), revision=named.revision, trust_remote_code=named.trust_remote_code
        )
    except OSError as error:
        raise UserError(_nowhere(named, error)) from None
    # The parsers behind it have errors of their own; that of a damaged tokenizer.json is a plain Exception.
    except Exception as error:
        # Of the ways out that transformers names only one is ours.
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"model {named.model!r}: {told}. Where it comes with code of its own, read that, and set trust_remote_code "
            "beside the model's name"
        ) from None


def _nowhere(named: Model, error: OSError) -> str:
    told = " ".join(str(error).split())[:200]
    return f"model {named.model!r}: neither a folder here nor to be had from the hub ({told})"


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
    return told if told and told != -1 else positions(load_config(named).get_text_config().to_dict())


def check_room(
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


def check_packing(named: Model) -> None:
    """Raises UserError where a model has layers that cannot keep packed rows apart (see `raykd.packed`)."""
    config = load_config(named).get_text_config()
    kinds: Iterable[str] = getattr(config, "layer_types", None) or ()
    strange = set(kinds) - {"full_attention", "sliding_attention"}
    if getattr(config, "attn_logit_softcapping", None):
        strange.add("soft-capped attention")
    if strange:
        raise UserError(
            f"model {named.model!r} has {', '.join(sorted(strange))}, where packed rows would mix: set "
            "train.packing=false"
        )


def same_tokens(first: Any, second: Any) -> bool:
    """Whether two tokenizers give every id the same meaning, so that ids may pass from one to the other."""
    return first.get_vocab() == second.get_vocab() and first.eos_token_id == second.eos_token_id


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
    messages = prompts.student_messages(problem, instruction, protocols.exemplars(protocol))
    if protocol == "zero_shot_raw":
        return list(tokenizer(protocols.raw_prompt(messages))["input_ids"])
    return prompt_token_ids(tokenizer, messages)


def question_text(tokenizer: Any, problem: Mapping[str, Any], instruction: str, protocol: Protocol) -> str:
    """What `question_token_ids` are the tokens of."""
    messages = prompts.student_messages(problem, instruction, protocols.exemplars(protocol))
    return protocols.raw_prompt(messages) if protocol == "zero_shot_raw" else prompt_text(tokenizer, messages)


def prompt_text(tokenizer: Any, messages: prompts.Messages) -> str:
    """What `prompt_token_ids` are the tokens of."""
    with _template(tokenizer):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, date_string=DATE_STRING
        )


def _template(tokenizer: Any) -> AbstractContextManager[None]:
    """A chat template may refuse a conversation, such as one that begins with a system message."""
    return as_user_error(f"model {getattr(tokenizer, 'name_or_path', '')!r}: its chat template fails", TemplateError)
