"""Compat: every use of a private interface of Ray, vLLM, transformers and DeepSpeed, in one place.

Each entry says why it is used, in which version it was read, and what happens without it. Nothing else in the package
names a private module, an attribute of another library that begins with an underscore, or an undocumented constant of
one; `tests/unit/test_compat.py` holds that, and fails for each interface that a new version takes away.

Versions read: Ray 2.60.0, vLLM 0.29.0, transformers 5.23.0, DeepSpeed 0.19.8. Heavy libraries are imported inside the
functions.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.llm._internal.common.callbacks.base import CallbackBase

HEAD_RESOURCE = "node:__internal_head__"
"""Resource that Ray gives to the head node alone (`ray._common.constants.HEAD_NODE_RESOURCE_NAME`).

Why: what watches over a run must not be lost with a worker node, and Ray has no public way to name the head.
Without it: tasks and actors that ask for it wait for ever."""

ACCELERATOR_TYPE_PREFIX = "accelerator_type:"
"""How the resource begins that a node with GPUs of a kind has (`ray._common.utils`).

Why: `accelerator_type` is an option of tasks and actors, and placement bundles have none.
Without it: bundles that ask for a kind of GPU wait for ever."""

INFERENCE_ERROR = "__inference_error__"
"""Column in which Ray Data LLM puts why a row failed; empty where it did not.

Why: `should_continue_on_error` is public and the name of its column is only in its documentation.
Without it: rows that failed cannot be told from empty answers; `KeyError`."""

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""File in which Ray Train keeps its list of a run's checkpoints (`ray.train.v2._internal.constants`).

Why: a list that is cut, by a full disk or a kill, ends the trial for good; it is looked at before Ray Train does.
Without it: a damaged list is not seen, and resuming such a trial fails in Ray Train."""

CHECKPOINT_PREFIX = "checkpoint_"
"""How the folders of Ray Train's checkpoints begin; what follows is the time.

Why: where the list is gone, the newest folder is looked for.
Without it: a trial whose list was damaged begins anew."""

ENGINE_DEAD_ERROR = "EngineDeadError"
"""Name of `engine_dead_error()`, for a process that does not load vLLM."""

ENGINE_START_TIMEOUT_ENV = "RAYLLM_ENGINE_START_TIMEOUT_S"
"""Environment variable by which Serve LLM waits so many seconds for an engine (`ray.llm._internal.serve.constants`).

Why: `LLMConfig` has no field for it.
Without it: Serve LLM gives up after an hour, whatever `teacher.start_timeout_s` is."""

OLD_TUNE_OUTPUT_ENV = "RAY_AIR_NEW_OUTPUT"
"""Environment variable of Tune; "0" for its older reporter, which prints nothing with `verbose=0`.

Why: the newer one prints tables all the same (`ray.tune.experimental.output`).
Without it: tables over the progress display."""


def checkpoint_names(snapshot: Any) -> list[str]:
    """Return the folders' names that Ray Train's list of checkpoints holds, as JSON was read from `CHECKPOINT_LIST`.

    Why and without it: see `CHECKPOINT_LIST`.

    Raises:
        KeyError, TypeError: where it is no such list.
    """
    return [each["checkpoint_dir_name"] for each in snapshot["checkpoint_results"]]


def keep_out_of_trials(names: Iterable[str]) -> None:
    """Keep environment variables out of the runtime environment of Tune's trials.

    Why: Tune copies those that `class_cache.ENV_VARS_TO_PROPAGATE` names, keys of a cloud among them, and Ray writes
    runtime environments into its logs. The nodes have the keys in their own environment.
    Without it: secrets in Ray's logs.

    Args:
        names: of the variables.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(names)


def draw_points(space: dict[str, Any], random: Any) -> Iterator[dict[str, Any]]:
    """Yield every combination of the grids of a search space, with one draw of its other fields.

    Why: Tune draws points only while it runs; here they are known, and named, before anything runs
    (`ray.tune.search.variant_generator`, a developers' interface).
    Without it: `ImportError`; another order of draws would be other points for the same seed.

    Args:
        space: Tune's domains by name.
        random: a numpy `Generator`.
    """
    from ray.tune.search.variant_generator import generate_variants

    for _, point in generate_variants(space, constant_grid_search=True, random_state=random):
        yield point


def hand_on_blocks(context: Any, blocks: int) -> None:
    """Let tasks of Ray Data hand on so many blocks between two looks of its scheduler.

    Why: the scheduler looks ten times a second and takes 2 blocks of a task each time by default, which holds a task
    that cuts up thousands of rows to 20 blocks a second (`DataContext._max_num_blocks_in_streaming_gen_buffer`).
    Without it: the teacher gets 20 calls a second at most.

    Args:
        context: `ray.data.DataContext.get_current()`.
        blocks: how many.
    """
    context._max_num_blocks_in_streaming_gen_buffer = blocks


def engine_client(server: Any) -> Any:
    """Return vLLM's `AsyncLLM` of a running `ray.serve.llm.deployment.LLMServer`.

    Why: Serve LLM's methods speak OpenAI's protocol, an object for each token and log-probability, and one bad prompt
    refuses the whole call (`VLLMEngine._engine_client`).
    Without it: no answer from the served teacher; `AttributeError`.
    """
    return server.engine._engine_client


def engine_dead_error() -> type[Exception]:
    """Return the exception that vLLM's client raises when its engine is gone.

    Why: it alone says that the replica must be replaced; any other error is a row's own (`vllm.v1.engine.exceptions`).
    Without it: a dead engine fails all rows instead of being started again; `ImportError`.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def engine_callback() -> "type[CallbackBase]":
    """Return the base class of Serve LLM's callbacks, called before an engine loads.

    Why: `callback_config` of `LLMConfig` is public and takes a subclass of this only (`ray.llm._internal`). Its
    `ctx.runtime_env` holds the hub's tokens, which Ray would write into its logs.
    Without it: secrets in Ray's logs; `ImportError`.
    """
    from ray.llm._internal.common.callbacks.base import CallbackBase

    return CallbackBase


def attention_implementation(config: Any) -> str | None:
    """Return the name of the attention that a model computes with.

    Why: transformers has a public way to set it, and none to ask; where it cannot be set it only warns
    (`PretrainedConfig._attn_implementation`).
    Without it: packed rows would attend to each other unseen; `AttributeError`.
    """
    return config._attn_implementation


def is_stateful(model: Any) -> bool:
    """Return whether a model carries a state from token to token besides its attention, such as Mamba's.

    Why: such a state would pass from one packed row to the next (`GenerationMixin._is_stateful`).
    Without it: packing such a model would train on mixed rows.
    """
    return getattr(model, "_is_stateful", False)


def num_elements(parameter: Any) -> int:
    """Return the number of elements of a parameter, of all its shards under ZeRO stage 3.

    Why: DeepSpeed replaces a sharded parameter's data by an empty tensor and keeps its size in `ds_numel`.
    Without it: `numel()` is that of a worker's part, and the gradient buffer is too small.
    """
    return getattr(parameter, "ds_numel", parameter.numel())
