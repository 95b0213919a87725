"""Compat: every use of a private interface of Ray, vLLM, transformers and DeepSpeed, in one place.

Each entry says why the interface is used and what happens without it. No other module uses a private module, an
attribute with a leading underscore or an undocumented constant of another library. `tests/unit/test_compat.py` checks
that, and fails for each interface that a new version removes.

Versions checked: Ray 2.60.0, vLLM 0.29.0, transformers 5.23.0, DeepSpeed 0.19.8. The functions
import the heavy libraries themselves.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.llm._internal.common.callbacks.base import CallbackBase

HEAD_RESOURCE = "node:__internal_head__"
"""Resource of the head node only (`ray._common.constants.HEAD_NODE_RESOURCE_NAME`).

Why: actors that clean up after a run must not run on a worker node, which may be lost. Ray has no public way to select
the head node.
Without it: tasks and actors that require the resource stay pending."""

ACCELERATOR_TYPE_PREFIX = "accelerator_type:"
"""Prefix of the resource of a node with a GPU model (`ray._common.utils`).

Why: `accelerator_type` is an option of tasks and actors, and placement bundles have none.
Without it: placement groups that require a GPU model stay pending."""

INFERENCE_ERROR = "__inference_error__"
"""Column of Ray Data LLM with the error of a row; empty for a row without an error.

Why: `should_continue_on_error` is public and the name of its column is only in its documentation.
Without it: failed rows look like empty answers; `KeyError`."""

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""File in which Ray Train keeps its list of a run's checkpoints (`ray.train.v2._internal.constants`).

Why: a full disk or a kill may truncate the list, and Ray Train cannot resume such a trial. raykd checks and repairs the
list before Ray Train reads it.
Without it: resuming a trial with a damaged list fails in Ray Train."""

CHECKPOINT_PREFIX = "checkpoint_"
"""Prefix of the folders of Ray Train's checkpoints; a timestamp follows.

Why: if the list is damaged, the newest folder is used.
Without it: a trial with a damaged list restarts from the beginning."""

ENGINE_DEAD_ERROR = "EngineDeadError"
"""Name of `engine_dead_error()`, for processes that do not import vLLM."""

ENGINE_START_TIMEOUT_ENV = "RAYLLM_ENGINE_START_TIMEOUT_S"
"""Environment variable with the seconds that Serve LLM waits for an engine to start
(`ray.llm._internal.serve.constants`).

Why: `LLMConfig` has no field for it.
Without it: Serve LLM stops waiting after one hour, whatever `teacher.start_timeout_s` is."""

OLD_TUNE_OUTPUT_ENV = "RAY_AIR_NEW_OUTPUT"
"""Environment variable of Tune; "0" selects its older reporter, which prints nothing with `verbose=0`.

Why: the newer one prints tables with `verbose=0`, too (`ray.tune.experimental.output`).
Without it: tables overwrite the progress display."""


def checkpoint_names(snapshot: Any) -> list[str]:
    """Return the names of the checkpoint folders in Ray Train's list of checkpoints.

    Why and without it: see `CHECKPOINT_LIST`.

    Args:
        snapshot: the parsed JSON of `CHECKPOINT_LIST`.

    Raises:
        KeyError, TypeError: if it is not such a list.
    """
    return [result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]]


def keep_out_of_trials(names: Iterable[str]) -> None:
    """Keep environment variables out of the runtime environment of Tune's trials.

    Why: Tune copies the variables of `class_cache.ENV_VARS_TO_PROPAGATE`, which include cloud credentials, and Ray
    writes runtime environments into its logs. The nodes have the credentials in their own environment.
    Without it: secrets in Ray's logs.

    Args:
        names: names of the variables.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(names)


def do_not_retry(is_final: Callable[[BaseException], bool]) -> None:
    """Keep Ray Train from restarting workers after an error that would occur again.

    Why: `FailureConfig.max_failures` counts every error of a worker alike, and Ray Train has no public way to choose
    (`ray.train.v2._internal.execution.failure_handling`). The function that makes the policy is replaced in this
    process, which creates Ray Train's controller.
    Without it: a trial that diverges, or has no examples, is started again `train.max_failures` times.

    Args:
        is_final: whether an exception of a worker would occur again.
    """
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
    from ray.train.v2.api import data_parallel_trainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    class Policy(DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> FailureDecision:
            if isinstance(training_failed_error, WorkerGroupError) and any(
                is_final(error) for error in training_failed_error.worker_failures.values()
            ):
                return FailureDecision.RAISE
            return super().make_decision(training_failed_error)

    data_parallel_trainer.create_failure_policy = Policy  # pyright: ignore[reportPrivateImportUsage]


def draw_points(space: dict[str, Any], random: Any) -> Iterator[dict[str, Any]]:
    """Yield every combination of the grids of a search space, with one sample of its other fields.

    Why: Tune samples points only while it runs, and raykd needs them before anything runs
    (`ray.tune.search.variant_generator`, a developer interface).
    Without it: `ImportError`. Another order of sampling would give other points for the same seed.

    Args:
        space: Tune's domains by field.
        random: a NumPy `Generator`.
    """
    from ray.tune.search.variant_generator import generate_variants

    for _, point in generate_variants(space, constant_grid_search=True, random_state=random):
        yield point


def set_output_buffer_blocks(context: Any, blocks: int) -> None:
    """Set the number of output blocks that a task of Ray Data may buffer for its scheduler.

    Why: the scheduler polls ten times a second and by default takes 2 blocks of a task each time. That limits a task
    that splits thousands of rows to 20 blocks per second (`DataContext._max_num_blocks_in_streaming_gen_buffer`).
    Without it: the teacher receives at most 20 calls per second.

    Args:
        context: `ray.data.DataContext.get_current()`.
        blocks: the number of blocks.
    """
    context._max_num_blocks_in_streaming_gen_buffer = blocks


def engine_client(server: Any) -> Any:
    """Return vLLM's `AsyncLLM` of a running `ray.serve.llm.deployment.LLMServer`.

    Why: Serve LLM's methods use OpenAI's protocol, with an object for each token and log-probability, and one invalid
    prompt fails the whole call (`VLLMEngine._engine_client`).
    Without it: no completions from the served teacher; `AttributeError`.
    """
    return server.engine._engine_client


def engine_dead_error() -> type[Exception]:
    """Return the exception that vLLM's client raises after its engine died.

    Why: only this exception means that the replica must be replaced; others concern one row
    (`vllm.v1.engine.exceptions`).
    Without it: a dead engine fails all rows instead of being restarted; `ImportError`.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def engine_callback() -> "type[CallbackBase]":
    """Return the base class of Serve LLM's callbacks, called before an engine loads.

    Why: `callback_config` of `LLMConfig` is public, but takes only a subclass of this class (`ray.llm._internal`). Its
    `ctx.runtime_env` holds the tokens of the Hugging Face Hub, which Ray would write into its logs. `ctx.run_init_node`
    is whether a task on each node imports vLLM to download the model.
    Without it: secrets in Ray's logs, and engines that load later; `ImportError`.
    """
    from ray.llm._internal.common.callbacks.base import CallbackBase

    return CallbackBase


def attention_implementation(config: Any) -> str | None:
    """Return the name of a model's attention implementation.

    Why: transformers has a public way to set it but none to read it, and only warns if it cannot be set
    (`PretrainedConfig._attn_implementation`).
    Without it: packed rows could attend to each other without an error; `AttributeError`.
    """
    return config._attn_implementation


def is_stateful(model: Any) -> bool:
    """Return whether a model has a recurrent state besides its attention, such as Mamba's.

    Why: such a state leaks from one packed row into the next (`GenerationMixin._is_stateful`).
    Without it: packing such a model would mix rows in training.
    """
    return getattr(model, "_is_stateful", False)


def skip_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives for CPUs.

    Why: `deepspeed.init_distributed` compiles them when it first runs on a CPU, which takes a C++ compiler and minutes,
    and only inference uses them (`TorchBackend.inference_all_reduce`). There is no public way to turn them off
    (`deepspeed.ops.__compatible_ops__`).
    Without it: the first training in a new environment starts minutes later.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_sharded(parameter: Any) -> bool:
    """Return whether a parameter is sharded over the workers by ZeRO stage 3.

    Why: DeepSpeed marks such parameters by the attribute `ds_id` alone.
    Without it: a worker would use its own shard as the whole parameter.
    """
    return hasattr(parameter, "ds_id")


def num_elements(parameter: Any) -> int:
    """Return the number of elements of a parameter, over all its shards under ZeRO stage 3.

    Why: DeepSpeed replaces a sharded parameter's data by an empty tensor and keeps its size in `ds_numel`.
    Without it: `numel()` counts one worker's shard, and the gradient buffer is too small.
    """
    return getattr(parameter, "ds_numel", parameter.numel())
