"""Compat: each private interface exists and works as used, and no other module uses one."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import tune

import raykd
from raykd import compat
from raykd.config.sections import Teacher
from raykd.errors import StageError
from raykd.teacher import server

SOURCE = Path(raykd.__file__).parent
# Libraries whose private interfaces are checked.
FOREIGN = ("ray", "vllm", "transformers", "deepspeed", "torch", "peft", "datasets", "optuna")
# Names that only compat.py may contain.
COMPAT_NAMES = {value for name, value in vars(compat).items() if name.isupper()} | {
    "ds_numel",
    "ds_id",
    "ENV_VARS_TO_PROPAGATE",
}


def private_uses(file: Path) -> list[str]:
    """Return a file's imports of private modules, and its private attributes of objects other than `self` and `cls`."""
    tree = ast.parse(file.read_text())
    found = []
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            is_private = any(part.startswith("_") and part != "__version__" for part in name.split("."))
            if name.split(".")[0] in FOREIGN and (is_private or name.startswith(("vllm.v1", "ray.train.v2"))):
                found.append(name)
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            is_os_exit = node.attr == "_exit"
            if node.attr not in own and not is_os_exit:
                found.append(ast.unparse(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in COMPAT_NAMES:
            found.append(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            text = node.args[1]
            if isinstance(text, ast.Constant) and re.match("_[a-z]", str(text.value)):
                found.append(ast.unparse(node))
    return found


FILES = sorted(
    file
    for folder in (SOURCE, SOURCE.parents[1] / "benchmarks", SOURCE.parents[1] / "rayjobs")
    for file in folder.rglob("*.py")
    if file.name != "compat.py"
)


def test_no_other_module_uses_a_private_interface():
    found = {f"{file.parent.name}/{file.name}": uses for file in FILES if (uses := private_uses(file))}
    assert not found, f"move these uses to compat.py, document the reason, and add a test here: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "from vllm.v1.engine.exceptions import EngineDeadError",
        "from ray.llm._internal.common.callbacks import base",
        "import ray._private.ray_constants",
        "x = model.config._attn_implementation",
        "x = getattr(model, '_is_stateful', False)",
        "resources = {'node:__internal_head__': 1}",
    ],
)
def test_private_use_is_detected(line: str, tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(line)
    assert private_uses(file)


def test_each_entry_documents_reason_and_consequence():
    tree = ast.parse(Path(compat.__file__).read_text())
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    for node in public:
        text = ast.get_docstring(node) or ""
        assert "Why" in text and "ithout it:" in text, node.name
    constants = [at for at, node in enumerate(tree.body) if isinstance(node, ast.Assign)]
    for at in constants:
        docstring = tree.body[at + 1]
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant), ast.unparse(tree.body[at])
        text = str(docstring.value.value)
        assert "ENGINE_DEAD_ERROR" in ast.unparse(tree.body[at]) or ("Why:" in text and "Without it:" in text), text


def test_deepspeed_compiles_no_collectives(monkeypatch: pytest.MonkeyPatch):
    from deepspeed import ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    monkeypatch.setitem(ops.__compatible_ops__, ShareMemCommBuilder.NAME, True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    compat.skip_shared_memory_collectives()
    # `deepspeed.comm` has an attribute of the same name.
    assert importlib.import_module("deepspeed.comm.torch").build_shm_op() is None


def test_ray_head_has_its_resource():
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert HEAD_NODE_RESOURCE_NAME == compat.HEAD_RESOURCE


def test_ray_gpu_models_have_a_resource():
    from ray._common.utils import RESOURCE_CONSTRAINT_PREFIX

    assert RESOURCE_CONSTRAINT_PREFIX == compat.ACCELERATOR_TYPE_PREFIX


def test_ray_data_records_the_error_of_a_row():
    from ray.llm._internal.batch.stages import vllm_engine_stage

    assert f'"{compat.INFERENCE_ERROR}": error_msg' in inspect.getsource(vllm_engine_stage)


def test_ray_train_lists_its_checkpoints():
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager
    from ray.train.v2._internal.execution.storage import StorageContext

    assert CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == compat.CHECKPOINT_LIST
    assert f'"{compat.CHECKPOINT_PREFIX}' in inspect.getsource(StorageContext.make_default_checkpoint_dir_name)
    assert "checkpoint_results" in checkpoint_manager._CheckpointManagerState.model_fields
    assert "checkpoint_dir_name" in checkpoint_manager._TrainingResultState.model_fields
    assert compat.checkpoint_names({"checkpoint_results": [{"checkpoint_dir_name": "a"}]}) == ["a"]
    with pytest.raises(KeyError):
        compat.checkpoint_names({})


def test_tune_copies_listed_environment_variables(monkeypatch: pytest.MonkeyPatch):
    from ray.tune.execution import class_cache

    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {
        *class_cache.ENV_VARS_TO_PROPAGATE,
        *re.findall('"(AWS_[A-Z_]+)"', inspect.getsource(class_cache)),
    }
    assert "in ENV_VARS_TO_PROPAGATE" in inspect.getsource(class_cache._ActorClassCache.get)
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {"SECRET", "OTHER"})
    compat.keep_out_of_trials(["SECRET", "NOT_THERE"])
    assert {"OTHER"} == class_cache.ENV_VARS_TO_PROPAGATE


def test_older_tune_output_can_be_selected(monkeypatch: pytest.MonkeyPatch):
    from ray.tune.experimental.output import get_air_verbosity

    monkeypatch.setenv(compat.OLD_TUNE_OUTPUT_ENV, "0")
    assert get_air_verbosity(0) is None
    monkeypatch.setenv(compat.OLD_TUNE_OUTPUT_ENV, "1")
    assert get_air_verbosity(0) is not None


def test_serve_llm_reads_the_engine_start_timeout():
    from ray.llm._internal.serve import constants

    assert f'"{compat.ENGINE_START_TIMEOUT_ENV}"' in inspect.getsource(constants)


def test_draw_points_is_seeded_and_covers_grids():
    space = {"a": tune.grid_search([1, 2]), "b": tune.uniform(0, 1)}
    first, same = (list(compat.draw_points(space, np.random.default_rng(3))) for _ in range(2))
    assert first == same
    assert [point["a"] for point in first] == [1, 2]
    assert first[0]["b"] == first[1]["b"], "the combinations of a grid have different draws"


def test_ray_data_honors_the_block_buffer():
    """Setting an unknown name would neither have an effect nor raise an error."""
    from ray.data import DataContext
    from ray.data._internal.execution.interfaces import op_runtime_metrics

    context: Any = DataContext()
    before = dict(vars(context))
    compat.set_output_buffer_blocks(context, 77)
    (name,) = [name for name, value in vars(context).items() if value != before.get(name)]
    assert name in before
    assert name in inspect.getsource(op_runtime_metrics)


def test_serve_llm_engine_has_the_vllm_client():
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.llm.deployment import LLMServer

    assert "self._engine_client = self._start_async_llm_engine(" in inspect.getsource(VLLMEngine)
    classes = [each for each in LLMServer.__mro__ if each.__module__.startswith("ray.")]
    assert any("self.engine = " in inspect.getsource(each) for each in classes)
    assert compat.engine_client(SimpleNamespace(engine=SimpleNamespace(_engine_client=3))) == 3


def test_vllm_raises_engine_dead_error():
    from vllm.v1.engine import async_llm

    assert issubclass(compat.engine_dead_error(), Exception)
    assert compat.engine_dead_error().__name__ == compat.ENGINE_DEAD_ERROR
    assert async_llm.EngineDeadError is compat.engine_dead_error()


def test_serve_llm_callback_has_runtime_environment():
    base: Any = compat.engine_callback()
    callback = base(llm_config=None, ctx_kwargs={"runtime_env": {"env_vars": {"A": "1"}}})
    assert callback.ctx.runtime_env == {"env_vars": {"A": "1"}}
    assert callback.ctx.run_init_node
    from ray.llm._internal.serve.engines.vllm import vllm_engine

    assert "if callback.ctx.run_init_node:" in inspect.getsource(vllm_engine)


def test_teacher_callback_removes_tokens_and_skips_downloads_of_folders():
    from raykd.teacher.deployment_callback import PrepareNodes

    for model, has_download in (("meta-llama/Llama-3.1-8B-Instruct", True), ("raykd/demo-teacher", False)):
        runtime_env = {"env_vars": {"HF_TOKEN": "secret", "A": "1"}}
        config = server.llm_config(Teacher(model=model), 0, "cpu")
        context = PrepareNodes(config, ctx_kwargs={"runtime_env": runtime_env}).ctx
        assert context.run_init_node is has_download
        assert context.runtime_env == {"env_vars": {"A": "1"}}


def test_transformers_attention_and_statefulness_are_readable():
    from transformers import LlamaConfig, LlamaForCausalLM, MambaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    assert compat.attention_implementation(model.config) == "eager"
    assert not compat.is_stateful(model)
    assert compat.is_stateful(MambaForCausalLM)


def test_deepspeed_keeps_the_size_of_a_sharded_parameter():
    import torch
    from deepspeed.runtime.zero import partition_parameters

    source = inspect.getsource(partition_parameters)
    assert "param.ds_numel = " in source and "param.ds_id = " in source
    parameter: Any = torch.nn.Parameter(torch.zeros(0))
    assert compat.num_elements(parameter) == 0
    assert not compat.is_sharded(parameter)
    parameter.ds_numel, parameter.ds_id = 12, 0
    assert compat.is_sharded(parameter)
    assert compat.num_elements(parameter) == 12


def test_only_lost_workers_are_started_again(monkeypatch: pytest.MonkeyPatch):
    from ray.train import FailureConfig
    from ray.train.v2.api import data_parallel_trainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    monkeypatch.setattr(data_parallel_trainer, "create_failure_policy", None)
    compat.do_not_retry(lambda error: isinstance(error, StageError))
    policy = data_parallel_trainer.create_failure_policy(FailureConfig(max_failures=3))
    decisions = [
        policy.make_decision(WorkerGroupError("failed", {0: error})).name
        for error in (ConnectionError("lost"), StageError("diverged"))
    ]
    assert decisions == ["RETRY", "RAISE"]
