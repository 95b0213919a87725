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

from raykd.config.sections import Student, Teacher
from raykd.errors import UserError, as_user_error
from raykd.models.builtin import resolve_model
from raykd.storage import hashing

Model = Teacher | Student


def identify_model(named: Model) -> dict[str, str]:
    """What identifies a model's weights and tokenizer: the folder's content, or the hub's commit.

    Raises:
        UserError: where the model can neither be found on disk nor on the hub.
    """
    if isinstance(named, Teacher) and named.uses_chat_api:
        # Whatever the server has under that name.
        return {"model": named.model, "revision": named.revision or "unknown"}
    model, path = named.model, Path(resolve_model(named.model))
    if path.is_dir():
        return {"model": model, "revision": hashing.fingerprint(path)}
    try:
        load_config(named)
    except OSError as error:
        raise UserError(_not_found(named, error)) from None
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
    return None if teacher.uses_chat_api else load_tokenizer(teacher)


def _load(kind: Any, named: Model) -> Any:
    try:
        return kind.from_pretrained(
            resolve_model(named.model), revision=named.revision, trust_remote_code=named.trust_remote_code
        )
    except OSError as error:
        raise UserError(_not_found(named, error)) from None
    # The parsers behind it have errors of their own; that of a damaged tokenizer.json is a plain Exception.
    except Exception as error:
        # Of the ways out that transformers names only one is ours.
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"model {named.model!r}: {told}. Where it comes with code of its own, read that, and set trust_remote_code "
            "beside the model's name"
        ) from None


def _not_found(named: Model, error: OSError) -> str:
    told = " ".join(str(error).split())[:200]
    return f"model {named.model!r}: neither a folder here nor to be had from the hub ({told})"


def check_packing(named: Model) -> None:
    """Raises UserError where a model has layers that cannot keep packed rows apart (see `raykd.training.packing`)."""
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


def have_same_tokens(first: Any, second: Any) -> bool:
    """Whether two tokenizers give every id the same meaning, so that ids may pass from one to the other."""
    return first.get_vocab() == second.get_vocab() and first.eos_token_id == second.eos_token_id


def _template(tokenizer: Any) -> AbstractContextManager[None]:
    """A chat template may refuse a conversation, such as one that begins with a system message."""
    return as_user_error(f"model {getattr(tokenizer, 'name_or_path', '')!r}: its chat template fails", TemplateError)


def load_base_model(student: Student, dtype: torch.dtype) -> Any:
    """The frozen base model."""
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(student.model),
        revision=student.revision,
        trust_remote_code=student.trust_remote_code,
        # Never by pickle, which can hold code.
        use_safetensors=True,
        dtype=dtype,
    )
