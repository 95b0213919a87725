"""Identity: the content of all keys: of problem sets, completion sets, trials, predictions and other stored results.

A key is a hash of content: the JSON values that determine what is stored under the key. Each function below returns the
content of one kind of key. No other module decides what belongs to a key.

Rules:

1. A field of the configuration is in the content unless it is marked by `RUNTIME_ONLY` (`raykd.config.base`).
2. A field that an arm does not use is left out (`unused_fields`): `top_k` with hard targets, `top_p` with greedy
   decoding.
3. A field at its default is left out. So a new field with a default changes no key.
4. An argument of vLLM is in the content unless `RUNTIME_ARGUMENTS` names it. An unknown argument is in the content.
5. Settings that only affect rounding are not in the content: parallel layouts, compilation, packing and the size of
   calls and micro-batches change the order of additions, and so sometimes a token. Number formats are in the content:
   `dtype`, `quantization`, `kv_cache_dtype`.

By rule 3 a changed default would give old and new results the same key. `VERSIONS` prevents that. Raise the version of
each affected kind when you change a default, the meaning of a field or the computation of results.
`tests/unit/test_pinned_defaults.py` pins the defaults, and `tests/unit/test_identity.py` some keys.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raykd.config import overrides
from raykd.config.base import ConfigModel, is_runtime_only
from raykd.config.engine import Sampling
from raykd.config.experiment import Arm, Experiment
from raykd.config.sections import Attention, Dataset, Evaluate, Sweep, Teacher
from raykd.data import prompts
from raykd.data.demo_problems import GENERATOR_VERSION
from raykd.storage import hashing, schemas

VERSIONS = {"problems": 1, "completions": 1, "trial": 1, "predictions": 1, "attention": 1, "search": 1}

# All arguments of vLLM 0.29.0 (`vllm.engine.arg_utils.AsyncEngineArgs`), grouped by topic. `_RUNTIME`: arguments that
# affect only how an engine runs. `_ANSWER`: arguments that affect its answers.
_RUNTIME = {
    "source and loading of the same weights (load_format: see engine_arguments)": """
        download_dir hf_token load_format max_parallel_loading_workers model_loader_extra_config model_weights
        pt_load_map_location safetensors_load_strategy safetensors_prefetch_block_size
        safetensors_prefetch_num_threads use_tqdm_on_load weight_transfer_config
    """,
    "compilation and graphs: the same arithmetic": """
        compilation_config cudagraph_capture_sizes enable_flashinfer_autotune enforce_eager
        max_cudagraph_capture_size optimization_level performance_mode specialize_active_lora
    """,
    "scheduling: which requests share a step": """
        async_scheduling disable_cascade_attn disable_chunked_mm_input enable_chunked_prefill
        long_prefill_token_threshold max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens
        max_num_scheduled_tokens max_num_seqs prefill_schedule_interval scheduler_reserve_full_isl scheduling_policy
        stream_interval watermark
    """,
    "memory: the KV cache and its blocks, prefix caching, offloading to the host, sleep mode": """
        block_size cpu_offload_gb cpu_offload_params disable_hybrid_kv_cache_manager enable_cumem_allocator
        enable_prefix_caching enable_sleep_mode gpu_memory_utilization kv_cache_memory_bytes kv_events_config
        kv_offloading_backend kv_offloading_size kv_transfer_config mamba_block_size mamba_cache_mode
        num_gpu_blocks_override offload_backend offload_group_size offload_num_in_group offload_params
        offload_prefetch_step prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit
    """,
    "parallel layouts, processes and the addresses of executors": """
        _api_process_count _api_process_rank cp_kv_cache_interleave_size cpu_distributed_timeout_seconds
        data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
        data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port data_parallel_size
        data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold dbo_prefill_token_threshold
        dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate decode_context_parallel_size device_ids
        disable_custom_all_reduce disable_nccl_for_dp_synchronization distributed_executor_backend
        distributed_timeout_seconds enable_batch_sharded_sampling enable_dbo enable_elastic_ep
        enable_ep_weight_filter enable_eplb enable_expert_parallel enable_fault_tolerance eplb_config
        expert_placement_strategy fault_tolerance_config fully_sharded_loras master_addr master_port max_cpu_loras
        max_loras nnodes node_rank numa_bind numa_bind_cpus numa_bind_nodes pipeline_parallel_size
        prefill_context_parallel_size ray_workers_use_nsight renderer_num_workers shutdown_timeout
        tensor_parallel_size ubatch_size
    """,
    "logs, metrics, limits and names of a server": """
        aggregate_engine_logging allowed_local_media_path allowed_media_domains collect_detailed_traces
        cudagraph_metrics disable_log_stats enable_layerwise_nvtx_tracing enable_log_requests
        enable_logging_iteration_details enable_mfu_metrics enable_mm_processor_stats enable_return_routed_experts
        fail_on_environ_validation jit_monitor_mode jit_monitor_verbose kv_cache_metrics kv_cache_metrics_sample
        max_logprobs max_lora_rank otlp_traces_endpoint per_request_spec_decode_metrics profiler_config
        return_sampling_mask served_model_name show_hidden_metrics_for_version
    """,
    "caches and transport of images, which no problem has": """
        ec_manager_config ec_transfer_config mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb
        mm_processor_cache_gb mm_processor_cache_type mm_processor_device mm_shm_cache_max_object_size_mb
        mm_tensor_ipc skip_mm_profiling
    """,
}
_ANSWER = {
    "the model, its code and its tokenizer": """
        code_revision config_format convert hf_config_path hf_overrides ignore_patterns io_processor_plugin
        language_model_only model model_class_overrides model_impl revision runner skip_tokenizer_init tokenizer
        tokenizer_mode tokenizer_revision trust_remote_code
    """,
    "length limits, stopping and changes of answers": """
        diffusion_config disable_sliding_window enable_prompt_embeds enable_trace_replay generation_config
        kv_sharing_fast_prefill logits_processors logprobs_mode max_model_len override_generation_config
        pooler_config reasoning_config reasoning_parser reasoning_parser_plugin seed spec_method spec_model
        spec_tokens speculative_config structured_outputs_config tokens_only use_fp64_gumbel
    """,
    "number formats, and kernels that may choose their own": """
        all2all_backend allow_deprecated_quantization attention_backend attention_config dtype
        enable_bf16x3_router_gemm enable_mamba_cache_stochastic_rounding gdn_prefill_backend ir_op_priority
        kda_prefill_backend kernel_config kv_cache_dtype kv_cache_dtype_skip_layers linear_backend mamba_backend
        mamba_cache_dtype mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm
        moe_backend quantization quantization_config replayssm_buffer_len use_replayssm
    """,
    "adapters": """
        default_mm_loras enable_lora enable_mixed_moe_lora_format enable_moe_shared_loras
        enable_tower_connector_lora lora_dtype lora_target_modules
    """,
    "image inputs": """
        enable_mm_embeds interleave_mm_strings limit_mm_per_prompt media_io_kwargs mm_device_do_normalize
        mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin
        mm_encoder_fp8_scale_save_path mm_encoder_only mm_processor_kwargs video_pruning_method video_pruning_rate
    """,
    "user code": """
        additional_config scheduler_cls worker_cls worker_extension_cls
    """,
}
RUNTIME_ARGUMENTS = frozenset(" ".join(_RUNTIME.values()).split())
ANSWER_ARGUMENTS = frozenset(" ".join(_ANSWER.values()).split())
# Values of `load_format` that change the weights: random weights, and quantization while loading.
_LOADS_OTHER_WEIGHTS = ("dummy", "bitsandbytes")


def fields(section: ConfigModel, with_defaults: bool = False) -> dict[str, Any]:
    """Return a section's fields as JSON values, without runtime-only fields and fields at their defaults.

    Args:
        section: the section; nested sections are treated alike.
        with_defaults: whether to include fields at their defaults.
    """
    values = {}
    for name, field in type(section).model_fields.items():
        if is_runtime_only(type(section), name):
            continue
        value = _plain(getattr(section, name), with_defaults)
        is_default = not field.is_required() and value == _plain(
            field.get_default(call_default_factory=True), with_defaults
        )
        if with_defaults or not is_default:
            values[name] = value
    return values


def _plain(value: Any, with_defaults: bool) -> Any:
    """Return a field's value as JSON values."""
    if isinstance(value, ConfigModel):
        return fields(value, with_defaults)
    if isinstance(value, Mapping):
        return {name: _plain(item, with_defaults) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, with_defaults) for item in value]
    return value


def unused_fields(arm: Arm) -> list[str]:
    """Return the dotted paths of the fields and sections that an arm does not use."""
    # The content of the completions holds the text of the arm's own strategy.
    paths = ["prompt.strategies"]
    if arm.targets.source != "teacher":
        paths += ["teacher.sampling", "teacher.num_samples"]
    if arm.targets.source != "student":
        paths += ["targets.rounds", "targets.warmup_rounds", "targets.rollout"]
    if arm.targets.kind == "hard":
        paths += ["targets.top_k", "loss"]
    if not arm.needs_teacher:
        paths.append("prompt.strategy")
    for path, sampling in (("teacher.sampling", arm.teacher.sampling), ("targets.rollout", arm.targets.rollout)):
        paths += [f"{path}.{name}" for name in _unused_of(sampling)]
    return paths


def effective_config(arm: Arm) -> dict[str, Any]:
    """Return an arm's sections as JSON values, without unused fields."""
    return _without(_resolved(arm).model_dump(mode="json"), unused_fields(arm))


def teacher_request(arm: Arm) -> dict[str, Any]:
    """Return the sequence source and the sampling of an arm's request to the teacher."""
    if arm.targets.source != "teacher":
        return {"source": arm.targets.source, "num_samples": 1}
    sampling = _without(fields(arm.teacher.sampling), _unused_of(arm.teacher.sampling))
    return {"source": "teacher", "num_samples": arm.teacher.num_samples, "sampling": sampling}


def problem_set(dataset: Dataset) -> dict[str, Any]:
    """Return the content of a problem set.

    Args:
        dataset: the configuration's section; its files must exist.
    """
    unused = {"demo": ["revision"], "gsm8k": ["seed"], "jsonl": ["seed", "revision"]}
    content = {
        "version": VERSIONS["problems"],
        "source": dataset.source,
        **_without(fields(dataset), unused[dataset.source]),
        "columns": schemas.PROBLEM.names,
    }
    if dataset.source == "demo":
        content["generator"] = GENERATOR_VERSION
    for name, path in (("train_file", dataset.train_file), ("test_file", dataset.test_file)):
        if path:
            content[name] = hashing.fingerprint(Path(path))
    return content


def train_problems(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a problem set's train and validation splits: all but the test split."""
    return {name: value for name, value in content.items() if name not in ("num_test", "test_file")}


def completion_set(
    experiment: Experiment, arm: Arm, problems: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the completion set that an arm needs.

    Args:
        experiment: the experiment.
        arm: one of its arms.
        problems: content of the problem set.
        model: the identity of the teacher's weights and tokenizer (`raykd.models.loading.identify_model`).
    """
    teacher = experiment.teacher
    code = {"trust_remote_code": True} if teacher.trust_remote_code else {}
    return {
        "version": VERSIONS["completions"],
        "problems": hashing.content_key(train_problems(problems)),
        # Without the name: two strategies with the same text give the same completions.
        "strategy": fields(experiment.strategies[arm.prompt.strategy]),
        "instruction": arm.prompt.instruction,
        "teacher": {**model, **code},
        **_served(teacher),
        **teacher_request(arm),
        "top_k": arm.targets.top_k if arm.targets.kind == "top_k" else 0,
        "columns": schemas.COMPLETION.names,
    }


def same_completions(content: Mapping[str, Any]) -> str:
    """Return a key that is the same for completion sets that differ only in the number of log-probabilities."""
    return hashing.content_key({name: value for name, value in content.items() if name != "top_k"})


def trial(
    experiment: Experiment,
    arm: Arm,
    seed: int,
    problems: Mapping[str, Any],
    completions: Mapping[str, Any] | None,
    student: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of a trial: all that determines its adapter and its validations.

    Args:
        experiment: the experiment.
        arm: one of its arms, with the values of a point if there is a sweep.
        seed: the trial's random seed.
        problems: content of the problem set.
        completions: content of the arm's completion set; None if the arm does not use the teacher.
        student: the identity of the student's weights.
    """
    sweep, evaluation = experiment.sweep, experiment.evaluate
    train_key = hashing.content_key(train_problems(problems))
    arm_fields = _without(fields(_resolved(arm)), unused_fields(arm))
    content = {
        "version": VERSIONS["trial"],
        # The content of the completions holds the teacher and its strategy.
        **{name: arm_fields[name] for name in ("student", "targets", "loss", "train") if name in arm_fields},
        "weights": dict(student),
        "instruction": arm.prompt.instruction,
        "problems": train_key,
        "seed": seed,
    }
    if completions:
        # The completion set may hold more log-probabilities than the arm uses.
        used_top_k = arm.targets.top_k if arm.targets.kind == "top_k" else 0
        content["completions"] = hashing.content_key({**completions, "top_k": used_top_k})
    if arm.targets.source == "student":
        content["rollout_engine"] = engine_arguments(evaluation.engine.engine_kwargs)
    if sweep:
        # The validations during training are part of a trial's results.
        content["validations"] = {"metric": sweep.metric, "num_validations": sweep.num_validations}
        if sweep.metric == "accuracy":
            content["validations"]["max_tokens"] = evaluation.sampling.max_tokens
    return content


def evaluation_settings(evaluation: Evaluate) -> dict[str, Any]:
    """Return the content of predictions, without students and problems."""
    return {
        "version": VERSIONS["predictions"],
        **_without(fields(evaluation), ["engine"]),
        "protocol": evaluation.protocol,
        "exemplars": [fields(each) for each in prompts.protocol_exemplars(evaluation.protocol)],
        "stop": prompts.stop_strings(evaluation),
        "sampling": _without(fields(evaluation.sampling), _unused_of(evaluation.sampling)),
        "engine_kwargs": engine_arguments(evaluation.engine.engine_kwargs),
    }


def attention_settings(section: Attention, dtype: str, statistics: Sequence[str]) -> dict[str, Any]:
    """Return the content of attention statistics, without students and problems.

    Args:
        section: the configuration's section.
        dtype: the number format of the model.
        statistics: names of the statistics.
    """
    return {"version": VERSIONS["attention"], **fields(section), "dtype": dtype, "statistics": list(statistics)}


def search_settings(sweep: Sweep) -> dict[str, Any]:
    """Return the content of a search. The number of points is not part of it."""
    return {"version": VERSIONS["search"], **_without(fields(sweep), ["num_samples", "test_top_n"])}


def experiment_fields(section: Experiment) -> dict[str, Any]:
    """Return the fields in which two runs of one experiment must agree, by dotted path and with defaults.

    Arms and seeds are left out, because they may be added and each trial has its own key. The settings of evaluation
    and attention are left out, because their results have their own keys. The settings of `evaluate` that affect the
    training are included if an arm or the sweep uses them.
    """
    tree = _without(fields(section, with_defaults=True), ["arms", "seeds", "attention", "sweep", "evaluate"])
    tree["teacher"] = {**_without(tree["teacher"], ["engine", "endpoint"]), **_served(section.teacher)}
    if section.teacher.endpoint is None:
        tree["teacher"]["engine"] = {"engine_kwargs": tree["teacher"].pop("engine_kwargs")}
    values = dict(overrides.flatten(tree, ""))
    if any(section.arm(name).targets.source == "student" for name in section.arms):
        values["evaluate.engine.engine_kwargs"] = engine_arguments(section.evaluate.engine.engine_kwargs)
    if section.sweep and section.sweep.metric == "accuracy":
        values["evaluate.sampling.max_tokens"] = section.evaluate.sampling.max_tokens
    return values


def engine_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of vLLM that affect answers."""
    return {
        name: value
        for name, value in kwargs.items()
        if name not in RUNTIME_ARGUMENTS or (name == "load_format" and value in _LOADS_OTHER_WEIGHTS)
    }


def _served(teacher: Teacher) -> dict[str, Any]:
    """Return the fields of the engine or the endpoint that affect answers; the engine of an endpoint is unknown."""
    if teacher.endpoint:
        settings = _without(fields(teacher.endpoint), ["url", "identity"])
        server = {"server": teacher.endpoint.identity or teacher.endpoint.url, "model": teacher.served_model}
        return {"endpoint": {"api": teacher.endpoint.api, **settings, **server}}
    return {"engine_kwargs": engine_arguments(teacher.engine.engine_kwargs)}


def _unused_of(sampling: Sampling) -> list[str]:
    """Return the unused fields of a sampling: greedy decoding uses neither top_p nor a seed."""
    return [] if sampling.temperature else ["top_p", "seed"]


def _resolved(arm: Arm) -> Arm:
    """Return the arm with the default divergence in place of null."""
    if arm.targets.kind == "hard":
        return arm
    return arm.model_copy(update={"loss": arm.loss.model_copy(update={"divergence": arm.divergence})})


def _without(tree: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested mappings without the values at some dotted paths, which may be missing."""
    copy = dict(tree)
    for path in paths:
        first, _, rest = path.partition(".")
        if not rest:
            copy.pop(first, None)
        elif isinstance(copy.get(first), Mapping):
            copy[first] = _without(copy[first], [rest])
    return copy
