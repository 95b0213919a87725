"""What looks like a secret is refused by its key and repeated nowhere; other settings pass."""

from pathlib import Path
from typing import Any

import pytest

from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.config.secrets import find_secret, mask_secrets
from raykd.errors import UserError

TREE: dict[str, Any] = {"name": "small", "teacher": {"model": "a"}, "student": {"model": "b"}}
# Made up.
VALUE = "PLANTED0000000000000000"


@pytest.mark.parametrize(
    ("override", "place"),
    [
        (f"teacher.engine.engine_kwargs={{api_key: {VALUE}}}", "engine_kwargs.api_key"),
        (
            f"teacher.engine.engine_kwargs={{model_loader_extra_config: {{aws_secret_access_key: {VALUE}}}}}",
            "engine_kwargs.model_loader_extra_config.aws_secret_access_key",
        ),
        (
            f"evaluate.engine.engine_kwargs={{kv_transfer_config: [{{s3: {{storage_key: {VALUE}}}}}]}}",
            "engine_kwargs.kv_transfer_config.0.s3.storage_key",
        ),
        *(
            (f"teacher.engine.env={{{name}: {VALUE}}}", f"env.{name}")
            for name in (
                *("PASSWD", "GITHUB_PAT", "MY_KEY", "AUTHORIZATION", "PRIVATE_KEY", "HF_TOKEN", "VLLM_API_KEY"),
                *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AWS_SECRET_ACCESS_KEY", "WHATEVER"),
            )
        ),
        (f"teacher.engine.env={{VLLM_CACHE_ROOT: 's3://me:{VALUE}@host/x'}}", "teacher.engine.env.VLLM_CACHE_ROOT"),
        (f"teacher.endpoint={{url: 'https://host.example/key/sk-{VALUE}/v1'}}", "teacher.endpoint.url"),
        (f"student.model=https://user:{VALUE}@host/model", "student.model"),
        (f"arms={{a: {{prompt.strategy: hf_{VALUE}}}}}", "arms.a.prompt.strategy"),
        (f"prompt.instruction='Bearer {VALUE}'", "prompt.instruction"),
        (f"train.epochs=ghp_{VALUE}", "train.epochs"),
        (f"teacher.model=[ghp_{VALUE}", "override"),
    ],
)
def test_secret_is_refused_and_not_repeated(tmp_path: Path, override: str, place: str):
    file = tmp_path / "small.yaml"
    file.write_text("name: small\nteacher: {model: a}\nstudent: {model: b}\n")
    with pytest.raises(UserError) as caught:
        load_experiment(file, [override])
    assert place in str(caught.value)
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (
            "env",
            {
                "OMP_NUM_THREADS": "2",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "CUDA_VISIBLE_DEVICES": "0",
                "NCCL_SOCKET_IFNAME": "eth0",
                "HF_HUB_OFFLINE": "1",
                "LD_PRELOAD": "libtcmalloc.so",
                "TOKENIZERS_PARALLELISM": "false",
            },
        ),
        (
            "engine_kwargs",
            {
                "tokenizer_mode": "auto",
                "max_num_batched_tokens": 512,
                "hf_token": True,
                "hf_overrides": {"image_token_index": 3},
                "speculative_config": {"num_speculative_tokens": 3},
            },
        ),
    ],
)
def test_other_settings_pass(section: str, values: dict[str, Any]):
    tree = {**TREE, "teacher": {"model": "a", "engine": {section: values}}}
    assert getattr(Experiment.model_validate(tree).teacher.engine, section) == values


def test_ordinary_texts_are_no_secrets():
    texts = [
        "http://host:8000/v1",
        "s3://bucket/prefix",
        "meta-llama/Llama-3.1-8B-Instruct",
        "task-specific words",
        "a@b:c",
    ]
    assert find_secret({"texts": texts}) is None
    assert [mask_secrets(text) for text in texts] == texts
    assert mask_secrets("https://me:word@host/x") == "https://(secret)@host/x"
