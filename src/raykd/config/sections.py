"""Sections of the configuration: fields, defaults and the checks that concern one section."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raykd.config.base import EXPAND_HOME, RUNTIME_ONLY, ConfigModel
from raykd.config.engine import Endpoint, Engine, Replicas, Sampling, check_accelerator, check_num_samples
from raykd.config.search_space import Axis
from raykd.errors import UserError

Protocol = Literal["zero_shot_chat", "eight_shot_cot", "zero_shot_raw"]


class Dataset(ConfigModel):
    """The problems, in a train, a validation and a test split."""

    source: Literal["demo", "gsm8k", "jsonl"] = "demo"
    """Source of the problems. `demo`: generated arithmetic problems. `gsm8k`: `openai/gsm8k` from the Hugging Face Hub.
    `jsonl`: your own files in the format of GSM8K."""
    train_file: Annotated[str | None, EXPAND_HOME] = None
    """JSON Lines file of the training problems, with the keys `question` and `answer`. The answer ends with a line
    `#### NUMBER`. Only for `source: jsonl`; otherwise null."""
    test_file: Annotated[str | None, EXPAND_HOME] = None
    """JSON Lines file of the test problems, in the same format. Only for `source: jsonl`; otherwise null."""
    revision: str = "main"
    """Branch, tag or commit of the dataset on the Hugging Face Hub. Only for `source: gsm8k`."""
    num_train: int | None = Field(default=None, ge=1)
    """Number of training problems, without the validation problems. null: all that remain."""
    num_validation: int = Field(default=0, ge=0)
    """Number of problems taken out of train for validation. A hash of each problem selects them, so the selection does
    not depend on the order. A sweep needs at least one."""
    num_test: int | None = Field(default=None, ge=1)
    """Number of test problems, from the start of the test split. null: all."""
    seed: int = 0
    """Random seed of the generated problems. Only for `source: demo`."""

    @model_validator(mode="after")
    def _files(self) -> Self:
        if self.source == "jsonl" and not (self.train_file and self.test_file):
            raise UserError("source=jsonl needs both files: set train_file and test_file")
        if self.source != "jsonl" and (self.train_file or self.test_file):
            raise UserError(
                f"train_file and test_file are read for source=jsonl only, not for source={self.source}: drop them"
            )
        if self.source == "demo" and not (self.num_train and self.num_test):
            raise UserError("source=demo has no fixed number of problems: set num_train and num_test")
        return self


class Teacher(ConfigModel):
    """The teacher model: how it is served and how it samples completions."""

    model: Annotated[str, EXPAND_HOME]
    """Local folder, name on the Hugging Face Hub, or `raykd/demo-teacher`. An API's model name with
    `endpoint.api: chat`."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hugging Face Hub. null: its default branch."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model's repository. The code has all rights of the process."""
    engine: Engine = Engine()
    """How vLLM runs the teacher."""
    endpoint: Endpoint | None = None
    """An OpenAI-compatible server to use instead of starting vLLM. null: vLLM is started on the cluster. With an
    endpoint, `replicas` and all of `engine` but `engine_kwargs.max_model_len` (tokens that the server accepts) are
    ignored."""
    replicas: Annotated[Replicas, RUNTIME_ONLY] = Replicas()
    """Number of copies of the teacher, scaled by Ray Serve."""
    sampling: Sampling = Sampling()
    """How the teacher samples its completions."""
    num_samples: int = Field(default=1, ge=1)
    """Number of completions for each problem. More than one needs `sampling.temperature` above 0."""
    batch_size: Annotated[int, RUNTIME_ONLY] = Field(default=32, ge=1)
    """Number of prompts in one call to the teacher. Their completions are written together."""
    concurrency: Annotated[int, RUNTIME_ONLY] = Field(default=16, ge=1)
    """Number of concurrent calls for each replica. Set it so that `concurrency` x `batch_size` exceeds vLLM's
    `max_num_seqs`; otherwise the engine waits for prompts."""
    timeout_s: Annotated[float, RUNTIME_ONLY] = Field(default=600, gt=0)
    """Time limit for one prompt, in seconds. A prompt that exceeds it counts as failed."""
    start_timeout_s: Annotated[float, RUNTIME_ONLY] = Field(default=3600, gt=0)
    """Time limit for starting the engine, in seconds, including the time that an autoscaler needs to add nodes."""
    max_error_rate: Annotated[float, RUNTIME_ONLY] = Field(default=0.01, ge=0, le=1)
    """Share of completions that may fail, 0 to 1. The stage fails above it."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        check_num_samples(self.num_samples, self.sampling)
        return self

    @property
    def uses_chat_api(self) -> bool:
        """Whether the teacher is an API that takes messages and returns text; no file of the model is needed then."""
        return self.endpoint is not None and self.endpoint.api == "chat"

    @property
    def served_model(self) -> str:
        """The model's name on the server of `endpoint`."""
        return (self.endpoint.model if self.endpoint else None) or self.model


class Evaluate(ConfigModel):
    """How the students answer the test problems."""

    protocol: Protocol = "zero_shot_chat"
    """Prompt format of the test problems. `zero_shot_chat`: the chat template, as in training. `eight_shot_cot`: chat
    after eight worked examples (chain of thought). `zero_shot_raw`: plain text to complete, as for a base model. After
    a change of protocol, earlier answers are kept."""
    engine: Engine = Engine()
    """How vLLM runs the students."""
    sampling: Sampling = Sampling()
    """How the students sample their answers."""
    num_samples: int = Field(default=1, ge=1)
    """Number of answers to each problem, for maj@k and pass@k. More than one needs `sampling.temperature` above 0."""
    stop: tuple[str, ...] | None = None
    """Strings that end an answer; they are removed from it. null: those of the protocol, `Question:` for
    `zero_shot_raw` and none for the others. End-of-turn tokens always end an answer."""
    max_loras: Annotated[int, RUNTIME_ONLY] = Field(default=8, ge=1)
    """Number of adapters in GPU memory at the same time. Further adapters are swapped in."""
    batch_size: Annotated[int, RUNTIME_ONLY] = Field(default=64, ge=1)
    """Number of rows in one batch of Ray Data. They are written together."""
    max_error_rate: Annotated[float, RUNTIME_ONLY] = Field(default=0.01, ge=0, le=1)
    """Share of answers that may fail, 0 to 1. The stage fails above it. It also holds for on-policy answers."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        check_num_samples(self.num_samples, self.sampling)
        if self.stop is not None and not all(self.stop):
            raise UserError("stop has an empty string, which would end every answer at once: remove it")
        return self

    def as_in_training(self, sampling: Sampling) -> Self:
        """Return these settings with the prompt format of training and the given sampling."""
        update = {"protocol": "zero_shot_chat", "num_samples": 1, "stop": None, "sampling": sampling}
        return self.model_copy(update=update)


class Attention(ConfigModel):
    """Statistics of each student's attention heads over the reference solutions of test problems."""

    num_problems: int = Field(default=100, ge=1)
    """Number of problems, from the start of the test split. A smaller test split is used in full."""
    num_workers: Annotated[int, RUNTIME_ONLY] = Field(default=1, ge=1)
    """Number of students measured at the same time, each in a process with its own model."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu"], RUNTIME_ONLY] = "auto"
    """Processor of each worker. `auto`: one GPU if the cluster has GPUs, otherwise the CPU."""
    accelerator_type: Annotated[str | None, RUNTIME_ONLY] = None
    """GPU model by Ray's name, such as `A10G`, `L4`, `A100-80G` or `H100`. null: any."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Number format of the model. null: `train.dtype`. Attention weights are float32 in any case."""
    batch_size: Annotated[int, RUNTIME_ONLY] = Field(default=8, ge=1)
    """Number of texts in one forward pass."""

    @model_validator(mode="after")
    def _check_accelerator(self) -> Self:
        check_accelerator(self.accelerator, self.accelerator_type)
        return self


class Prices(ConfigModel):
    """Prices of processors, for cost estimates and the report."""

    gpu_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU for one hour. null: no cost of GPUs is given."""
    teacher_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of one of the teacher's GPUs for one hour. null: `gpu_hour`."""
    cpu_hour: float | None = Field(default=None, ge=0)
    """Price of one CPU core for one hour. null: no cost of CPUs is given."""
    currency: str = "USD"
    """Currency of the prices; it is printed with them."""

    def per_hour(self, kind: str, *, is_teacher: bool = False) -> float | None:
        """Return the price of an hour of one processor, `cpu` or `gpu`; None where it is not configured."""
        if kind == "cpu":
            return self.cpu_hour
        return self.teacher_gpu_hour if is_teacher and self.teacher_gpu_hour is not None else self.gpu_hour


class Sweep(ConfigModel):
    """A hyperparameter search. Each arm is searched separately, with the same number of points. Validation problems
    (`dataset.num_validation`) decide; no student is trained on them."""

    space: dict[str, Axis] = Field(default_factory=dict)
    """Fields to search, by dotted path, such as `train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}`. Only fields in
    which arms may differ can be searched."""
    search: Literal["random", "optuna"] = "random"
    """How points are chosen. `random`: at random, the same points for every arm. `optuna`: by Optuna (Akiba et al.,
    arXiv 1907.10902), for each arm from the results of its earlier points."""
    num_samples: int = Field(default=8, ge=1)
    """Number of sampled points. Each is trained for every arm and seed, with every combination of the grids."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Early stopping, by comparison with other trials of the same arm. `asha`: successive halving (Li et al., arXiv
    1810.05934). `median`: stop trials below the median. `none`: no early stopping."""
    reduction_factor: float = Field(default=2, gt=1)
    """ASHA keeps 1 of `reduction_factor` trials at each rung, and trains it `reduction_factor` times as long. Only for
    `scheduler: asha`."""
    metric: Literal["accuracy", "loss"] = "accuracy"
    """Validation metric. `accuracy`: strict match of greedy answers. `loss`: nats per token of the reference
    solutions."""
    num_validations: int = Field(default=4, ge=1)
    """Number of validations of a trial, at equal distances; the last is at its end."""
    validation_batch_size: Annotated[int, RUNTIME_ONLY] = Field(default=32, ge=1)
    """Number of validation problems in one batch of one worker."""
    test_top_n: int | None = Field(default=None, ge=1)
    """Number of points of each arm, the best by validation, to evaluate on the test problems. null: all that were
    trained to the end."""
    seed: int = 0
    """Random seed of the search."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """Direction of the metric: `max` if a higher value is better."""
        return "max" if self.metric == "accuracy" else "min"

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.scheduler != "none" and self.num_validations < 2:
            raise UserError(
                f"num_validations={self.num_validations} is too few for scheduler={self.scheduler}, which compares "
                "trials before they end: set num_validations to 2 or more, or scheduler=none"
            )
        if self.search == "optuna":
            for path, axis in self.space.items():
                if axis.grid:
                    raise UserError(f"space.{path}: grid is not supported with search=optuna: use choice")
            if not self.space:
                raise UserError("search=optuna needs at least one field in space")
        return self
