"""Find, identify and load models and tokenizers from disk or from the Hugging Face Hub."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raykd.config.sections import Teacher
from raykd.config.training import Student
from raykd.display import summary
from raykd.errors import UserError, as_user_error
from raykd.models.builtin import resolve_model
from raykd.storage import hashing

Model = Teacher | Student


def identify_model(model: Model) -> dict[str, str]:
    """Return the identity of a model's weights and tokenizer: its folder's fingerprint, or the hub's commit.

    Args:
        model: the `teacher` or `student` section.

    Raises:
        UserError: the model is neither a local folder nor on the hub.
    """
    if isinstance(model, Teacher) and model.uses_chat_api:
        # The server's weights behind that name are unknown.
        return {"model": model.model, "revision": model.revision or "unknown"}
    path = Path(resolve_model(model.model))
    if path.is_dir():
        return {"model": model.model, "revision": hashing.fingerprint(path)}
    try:
        load_config(model)
    except OSError as error:
        raise UserError(_not_found(model, error)) from None
    commit = _commit(model.model, model.revision)
    return {"model": model.model, "revision": commit or model.revision or "unknown"}


def _commit(name: str, revision: str | None) -> str | None:
    """Return the hub's commit whose `config.json` was loaded: `revision` may be a branch, which moves."""
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    # The cache has a folder for each commit, named after it.
    return Path(cached).parent.name if isinstance(cached, str) else None


def load_config(model: Model) -> Any:
    """Return transformers' configuration of a model.

    Raises:
        UserError: it cannot be read, or needs remote code without `trust_remote_code`.
    """
    return _load(AutoConfig, model)


def load_tokenizer(model: Model) -> Any:
    """Return the tokenizer of a model, which must have a chat template.

    Raises:
        UserError: it has no chat template, cannot be read, or needs remote code without `trust_remote_code`.
    """
    tokenizer = _load(AutoTokenizer, model)
    if not tokenizer.chat_template:
        raise UserError(f"model {model.model!r} has no chat template; use an instruct model")
    return tokenizer


def teacher_tokenizer(teacher: Teacher) -> Any:
    """Return the teacher's tokenizer; None for a teacher behind a chat API, which tokenizes by itself."""
    return None if teacher.uses_chat_api else load_tokenizer(teacher)


def _load(auto_class: Any, model: Model) -> Any:
    try:
        return auto_class.from_pretrained(
            resolve_model(model.model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except OSError as error:
        raise UserError(_not_found(model, error)) from None
    # Parsers raise various errors; tokenizers raises a plain Exception for a damaged tokenizer.json.
    except Exception as error:
        # Of the remedies in transformers' message, only `trust_remote_code` applies here.
        message = summary(error)
        raise UserError(
            f"model {model.model!r}: {message}. If the model needs code of its own, review that code, then set "
            "trust_remote_code beside the model's name"
        ) from None


def _not_found(model: Model, error: OSError) -> str:
    message = summary(error)
    return (
        f"model {model.model!r}: not a local directory, and could not be loaded from the Hugging Face Hub ({message})"
    )


def check_packing(model: Model) -> None:
    """Raise UserError if a model has layers that would mix packed rows (see `raykd.training.packing`)."""
    config = load_config(model).get_text_config()
    kinds: Iterable[str] = getattr(config, "layer_types", None) or ()
    unsupported = set(kinds) - {"full_attention", "sliding_attention"}
    if getattr(config, "attn_logit_softcapping", None):
        unsupported.add("soft-capped attention")
    if unsupported:
        raise UserError(
            f"model {model.model!r} has {', '.join(sorted(unsupported))}, which would mix packed rows: set "
            "train.packing=false"
        )


def have_same_tokens(first: Any, second: Any) -> bool:
    """Return whether two tokenizers give every token id the same meaning."""
    return first.get_vocab() == second.get_vocab() and first.eos_token_id == second.eos_token_id


def template_errors(tokenizer: Any) -> AbstractContextManager[None]:
    """Turn errors of a chat template into UserErrors: some templates refuse messages with the role `system`."""
    return as_user_error(f"model {getattr(tokenizer, 'name_or_path', '')!r}: its chat template fails", TemplateError)


def load_base_model(student: Student, dtype: torch.dtype) -> Any:
    """Return the base model, with weights in `dtype`."""
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(student.model),
        revision=student.revision,
        trust_remote_code=student.trust_remote_code,
        # Pickle files can contain code.
        use_safetensors=True,
        dtype=dtype,
    )
