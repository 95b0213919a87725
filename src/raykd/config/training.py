"""Sections of the configuration that describe the student and its training."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raykd.config.base import EXPAND_HOME, RUNTIME_ONLY, ConfigModel
from raykd.config.engine import Sampling, check_accelerator
from raykd.errors import UserError


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

    model: Annotated[str, EXPAND_HOME]
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
    """Number of completions in one forward pass of one worker. It must divide `batch_size` / `num_workers`,
    unless it is larger."""
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
    num_workers: Annotated[int, RUNTIME_ONLY] = Field(default=1, ge=1)
    """Number of Ray Train workers of one trial."""
    min_workers: Annotated[int | None, RUNTIME_ONLY] = Field(default=None, ge=1)
    """Smallest number of workers with which a trial continues after losing a node. It grows back when nodes return. The
    optimizer steps stay the same. null: the trial waits until all `num_workers` fit again. A number below `num_workers`
    needs `zero_stage: 0` and `dtype: float32`."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu"], RUNTIME_ONLY] = "auto"
    """Processor of each worker. `auto`: one GPU if the cluster has GPUs, otherwise the CPU."""
    accelerator_type: Annotated[str | None, RUNTIME_ONLY] = None
    """GPU model by Ray's name, such as `A10G`, `L4`, `A100-80G` or `H100`. null: any."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], RUNTIME_ONLY] = 2
    """DeepSpeed ZeRO stage (Rajbhandari et al., arXiv 1910.02054)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the frozen weights and of the computation."""
    packing: Annotated[bool, RUNTIME_ONLY] = True
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
