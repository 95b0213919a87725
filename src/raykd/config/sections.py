"""Sections of the configuration: fields, defaults and the checks that concern one section."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raykd.config.base import RUNTIME_ONLY, ConfigModel
from raykd.config.engine import Endpoint, Engine, Replicas, Sampling, check_accelerator
from raykd.config.search_space import Axis
from raykd.errors import UserError

Protocol = Literal["zero_shot_chat", "eight_shot_cot", "zero_shot_raw"]


class Dataset(ConfigModel):
    """The problems, in a train, a validation and a test split."""

    source: Literal["demo", "gsm8k", "jsonl"] = "demo"
    """Source of the problems. `demo`: generated arithmetic problems. `gsm8k`: `openai/gsm8k` from the Hugging Face Hub.
    `jsonl`: your own files in the format of GSM8K."""
    train_file: str | None = None
    """JSON Lines file of the training problems, with the keys `question` and `answer`. The answer ends with a line
    `#### NUMBER`. Only for `source: jsonl`; otherwise null."""
    test_file: str | None = None
    """JSON Lines file of the test problems, in the same format. Only for `source: jsonl`; otherwise null."""
    revision: str = "main"
    """Branch, tag or commit of the data set on the Hugging Face Hub. Only for `source: gsm8k`."""
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

    model: str
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
    def _samples_differ(self) -> Self:
        if self.num_samples > 1 and not self.sampling.temperature:
            raise UserError(
                f"num_samples={self.num_samples} with sampling.temperature=0 gives identical samples: "
                "set sampling.temperature above 0"
            )
        return self

    @property
    def uses_chat_api(self) -> bool:
        """Whether the teacher is an API that takes messages and returns text; no file of the model is needed then."""
        return self.endpoint is not None and self.endpoint.api == "chat"

    @property
    def served_model(self) -> str:
        """The model's name on the server of `endpoint`."""
        return (self.endpoint.model if self.endpoint else None) or self.model


class Lora(ConfigModel):
    """LoRA adapter of the student (Hu et al., arXiv 2106.09685). The names are those of PEFT."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapter's matrices."""
    lora_alpha: float = Field(default=32, gt=0)
    """Scale of the adapter: its output is multiplied by `lora_alpha` / `r`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input during training, from 0 to below 1."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the linear layers that get an adapter."""


class Student(ConfigModel):
    """The student model and its adapter."""

    model: str
    """Local folder, name on the Hugging Face Hub, or `raykd/demo-student`."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hugging Face Hub. null: its default branch."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model's repository. The code has all rights of the process."""
    lora: Lora = Lora()
    """The adapter that is trained; the base model's weights stay frozen."""


class Targets(ConfigModel):
    """The sequences that the student is trained on, and the target at each of their tokens."""

    source: Literal["teacher", "reference", "student"] = "teacher"
    """Sequences to train on. `teacher`: the teacher's completions. `reference`: the reference solutions. `student`: the
    student's own answers (on-policy distillation)."""
    kind: Literal["hard", "top_k"] = "hard"
    """Target at each token. `hard`: the token. `top_k`: the log-probabilities of the primed teacher's `top_k` most
    probable tokens."""
    top_k: int = Field(default=16, ge=1, le=256)
    """Number of log-probabilities for each token. Only for `kind: top_k`."""
    filter: Literal["all", "correct", "best"] = "all"
    """Sequences to keep. `all`: every one. `correct`: those with the correct answer. `best`: one for each problem,
    preferring correct, then untruncated, then shortest."""
    deduplicate: bool = False
    """Whether to drop repeated completions with the same text for one problem."""
    rounds: int = Field(default=4, ge=1)
    """Number of rounds of on-policy training. Each round samples new answers with the current adapter and trains on
    them for an equal share of the steps. Only for `source: student`."""
    warmup_rounds: int = Field(default=0, ge=0)
    """Number of rounds, at the beginning, that train on the reference solutions instead. Use it for a student whose own
    answers are still poor. Only for `source: student`."""
    rollout: Sampling = Sampling(temperature=1.0)
    """How the student samples its own answers. Only for `source: student`."""

    @model_validator(mode="after")
    def _check_warmup_rounds(self) -> Self:
        if self.warmup_rounds >= self.rounds:
            raise UserError(
                f"warmup_rounds={self.warmup_rounds} leaves none of rounds={self.rounds} for the student's own "
                "answers: lower warmup_rounds or raise rounds"
            )
        return self


class Loss(ConfigModel):
    """The training loss with `targets.kind: top_k`. Hard targets use the cross entropy."""

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] | None = None
    """Divergence between teacher and student over the teacher's top-k tokens. `forward_kl`: KL(teacher || student).
    `reverse_kl`: KL(student || teacher). `jensen_shannon`: the mean of both KLs to the average distribution. null:
    `reverse_kl` for `targets.source: student`, otherwise `forward_kl`."""
    missing_mass: Literal["bucket", "renormalize"] = "bucket"
    """Treatment of the probability outside the top-k. `bucket`: one additional outcome. `renormalize`: dropped, and
    both distributions are scaled to sum to 1."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of both distributions. The divergence is multiplied by its square. Values other than 1 need
    `missing_mass: renormalize`."""
    cross_entropy_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the cross entropy on the sequence's tokens, 0 to 1. The divergence has the remaining weight."""

    @model_validator(mode="after")
    def _check_bucket_temperature(self) -> Self:
        if self.temperature != 1 and self.missing_mass == "bucket":
            raise UserError(
                f"temperature={self.temperature:g} with missing_mass=bucket is undefined, because the distribution "
                "outside the top-k is unknown: set loss.missing_mass=renormalize or loss.temperature=1"
            )
        return self


class Train(ConfigModel):
    """Training of one student with DeepSpeed under Ray Train."""

    epochs: int = Field(default=2, ge=1)
    """Number of passes over the training problems."""
    batch_size: int = Field(default=32, ge=1)
    """Number of completions in one optimizer step, over all workers. A multiple of `num_workers`."""
    micro_batch_size: Annotated[int, RUNTIME_ONLY] = Field(default=8, ge=1)
    """Number of completions in one forward pass of one worker. It must divide `batch_size` / `num_workers`."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps with a linear learning-rate warm-up, from 0 to below 1. A cosine decay follows."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Norm to which gradients are clipped. 0: no clipping."""
    max_length: int = Field(default=2048, ge=2)
    """Maximum length of a training example (prompt and completion), in tokens. Longer examples are dropped and counted,
    never truncated."""
    num_workers: int = Field(default=1, ge=1)
    """Number of Ray Train workers of one trial."""
    min_workers: Annotated[int | None, RUNTIME_ONLY] = Field(default=None, ge=1)
    """Smallest number of workers with which a trial continues after losing a node. It grows back when nodes return. The
    optimizer steps stay the same. null: the trial waits until all `num_workers` fit again. A number below `num_workers`
    needs `zero_stage: 0` and `dtype: float32`."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu"], RUNTIME_ONLY] = "auto"
    """Processor of each worker. `auto`: one GPU if the cluster has GPUs, otherwise the CPU."""
    accelerator_type: Annotated[str | None, RUNTIME_ONLY] = None
    """GPU model by Ray's name, such as `A10G`, `L4`, `A100-80G` or `H100`. null: any."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage (Rajbhandari et al., arXiv 1910.02054)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the frozen weights and of the computation."""
    packing: bool = True
    """Whether to pack the completions of a forward pass into one sequence without padding. They do not attend to each
    other. Set it to false for models whose attention does not support packing."""
    gradient_checkpointing: Annotated[bool, RUNTIME_ONLY] = False
    """Whether to recompute activations in the backward pass. It takes less memory and more time."""
    checkpoint_every_steps: Annotated[int, RUNTIME_ONLY] = Field(default=50, ge=1)
    """Number of optimizer steps between checkpoints."""
    max_failures: Annotated[int, RUNTIME_ONLY] = Field(default=3, ge=0)
    """Number of times that a trial is restarted from its last checkpoint after losing a worker."""

    @model_validator(mode="after")
    def _check_accelerator(self) -> Self:
        check_accelerator(self.accelerator, self.accelerator_type)
        return self

    @model_validator(mode="after")
    def _check_gradient_dtype(self) -> Self:
        if self.dtype == "bfloat16" and not self.zero_stage:
            raise UserError(
                "zero_stage=0 with dtype=bfloat16 is not supported, because DeepSpeed accumulates gradients in float32 "
                "only from stage 1 on: set train.zero_stage=2 (also for one GPU) or train.dtype=float32"
            )
        return self

    @model_validator(mode="after")
    def _check_min_workers(self) -> Self:
        if self.min_workers is not None and not self.min_workers <= self.num_workers:
            raise UserError(f"min_workers={self.min_workers} is above num_workers={self.num_workers}: lower it")
        if self.min_workers not in (None, self.num_workers) and self.zero_stage:
            raise UserError(
                f"min_workers={self.min_workers} needs zero_stage=0: a checkpoint of ZeRO stage {self.zero_stage} can "
                "only be resumed by as many workers as wrote it. Set zero_stage=0, which costs little memory for an "
                "adapter, or min_workers=null"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> Self:
        if self.batch_size % self.num_workers:
            raise UserError(f"batch_size={self.batch_size} is not a multiple of num_workers={self.num_workers}")
        per_worker = self.batch_size // self.num_workers
        if per_worker % min(self.micro_batch_size, per_worker):
            raise UserError(
                f"batch_size={self.batch_size} over num_workers={self.num_workers} is {per_worker} for each worker, "
                f"which is not a multiple of micro_batch_size={self.micro_batch_size}"
            )
        return self


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
    def _samples_differ(self) -> Self:
        if self.num_samples > 1 and not self.sampling.temperature:
            raise UserError(
                f"num_samples={self.num_samples} with sampling.temperature=0 gives identical samples: "
                "set sampling.temperature above 0"
            )
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


class Sweep(ConfigModel):
    """A hyper-parameter search. Each arm is searched separately, with the same number of points. Validation problems
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
