"""Student: rows, batches and the loss over a micro-batch, on a Llama of random weights."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.config.experiment import Arm
from raykd.config.sections import Lora, Loss, Student, Targets, Teacher, Train
from raykd.config.strategies import Prompt
from raykd.training import batching, student
from raykd.training.examples import Example
from raykd.training.packing import ATTENTION_NAME

V, K = 61, 5


def arm(**settings: Any) -> Arm:
    return Arm(
        teacher=Teacher(model="raykd/demo-teacher"),
        student=Student(model="none"),
        prompt=Prompt(),
        targets=settings.get("targets", Targets()),
        loss=settings.get("loss", Loss()),
        train=Train(),
    )


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config)
    base.set_attn_implementation(ATTENTION_NAME)
    adapted: Any = student.add_lora(base, Student(model="none"), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.double().eval()


def rows(soft: bool) -> list[Example]:
    generator = np.random.default_rng(0)
    made = []
    for prompt, answer in ((7, 5), (3, 9), (11, 1)):
        tokens = generator.integers(0, V, prompt + answer).tolist()
        log_p = np.log(generator.dirichlet(np.ones(V), answer))
        ids = np.argsort(-log_p, axis=-1)[:, :K].copy()
        best = np.take_along_axis(log_p, ids, -1).astype(np.float32)
        made.append(Example("p", tokens[:prompt], tokens[prompt:], *((ids, best) if soft else ())))
    return made


def by_row(model: Any, row: Example, chosen: Arm) -> torch.Tensor:
    """The loss of one row alone, from the model's own logits: each completion token by the logit before it."""
    tokens = row.prompt_token_ids + row.completion_token_ids
    first = len(row.prompt_token_ids)
    log_q = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, first - 1 : -1], -1)
    entropy = -log_q[torch.arange(len(row.completion_token_ids)), torch.tensor(row.completion_token_ids)].sum()
    if row.topk_ids_TK is None:
        return entropy
    log_p = torch.tensor(row.topk_logprobs_TK, dtype=torch.float64)
    rest_p, q = 1 - log_p.exp().sum(-1), log_q.gather(-1, torch.tensor(row.topk_ids_TK))
    rest_q = 1 - q.exp().sum(-1)
    kl = (log_p.exp() * (log_p - q)).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    weight = chosen.loss.cross_entropy_weight
    return weight * entropy + (1 - weight) * kl


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("chunk_elements", [1 << 20, 4 * V])
@pytest.mark.parametrize(
    "chosen",
    [arm(), arm(targets=Targets(kind="top_k", top_k=K), loss=Loss(cross_entropy_weight=0.3))],
    ids=["hard", "top_k"],
)
def test_a_micro_batch_is_the_sum_of_its_rows_however_it_is_laid_out(model, packing, chunk_elements, chosen):
    made = rows(soft=chosen.targets.kind == "top_k")
    expected = sum(by_row(model, row, chosen) for row in made)
    expected.backward()
    wanted = gradients(model)
    distillation = student.Distillation(model, chosen, chunk_elements)
    total = distillation(batching.collate(made, pad_token_id=0, packing=packing))
    total.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, wanted[name], atol=1e-4), name


@pytest.mark.parametrize("packing", [False, True])
def test_a_worker_without_rows_keeps_pace_and_adds_nothing(model, packing: bool):
    total = student.Distillation(model, arm())(batching.collate([], pad_token_id=0, packing=packing))
    total.backward()
    assert float(total.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


class _Largest(TorchDispatchMode):
    """The most float32 elements that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32 and each.shape[-1:] == (V,):
                self.elements = max(self.elements, each.numel())
        return made


def test_float32_logits_never_outgrow_a_chunk(model):
    model = model.bfloat16()
    chosen = arm(targets=Targets(kind="top_k", top_k=K), loss=Loss(cross_entropy_weight=0.5))
    batch = batching.collate(rows(soft=True) * 4, pad_token_id=0, packing=False)
    assert len(batch["positions"]) == 60
    with _Largest() as largest:
        student.Distillation(model, chosen, chunk_elements=8 * V)(batch).backward()
    assert largest.elements == 8 * V


def test_packed_rows_do_not_see_each_other(model):
    first, second, _ = rows(soft=False)
    distillation = student.Distillation(model, arm())

    def loss_of(*made: Example) -> float:
        return float(distillation(batching.collate(list(made), 0, packing=True)).detach())

    assert loss_of(first, second) == pytest.approx(loss_of(first) + loss_of(second), rel=1e-5)
    assert loss_of(second, first) == pytest.approx(loss_of(first, second), rel=1e-5)


def _saved_elements(learner: student.Distillation, batch: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """How many elements a forward pass keeps for the backward pass, and the loss."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = learner(batch)
    return sum(kept.values()), loss


def test_activation_checkpointing_keeps_less_and_changes_nothing():
    made = {}
    for checkpointing in (False, True):
        chosen = arm().model_copy(
            update={
                "student": Student(model="raykd/demo-student"),
                "train": Train(dtype="float32", gradient_checkpointing=checkpointing),
            }
        )
        learner = student.build_student(chosen, seed=0)
        assert all(module.training for module in learner.modules())
        batch = batching.collate([Example("p", [5] * 60, list(range(5, 65)))], pad_token_id=0, packing=False)
        kept, loss = _saved_elements(learner, batch)
        loss.backward()
        made[checkpointing] = kept, float(loss.detach()), gradients(learner)
    weights = sum(parameter.numel() for parameter in learner.parameters())
    assert made[True][0] - weights < 0.5 * (made[False][0] - weights)
    assert made[True][1] == pytest.approx(made[False][1], rel=1e-6)
    assert any(gradient.any() for gradient in made[True][2].values())
    for name, gradient in made[True][2].items():
        assert torch.allclose(gradient, made[False][2][name], atol=1e-5), name


def test_dropout_is_on_while_it_learns():
    lora = Lora(lora_dropout=0.5)
    chosen = arm().model_copy(update={"student": Student(model="raykd/demo-student", lora=lora)})
    learner = student.build_student(chosen.model_copy(update={"train": Train(dtype="float32")}), seed=0)
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batching.collate([Example("p", [5] * 6, list(range(5, 15)))], pad_token_id=0, packing=False)
    losses = {float(learner(batch).detach()) for _ in range(3)}
    assert len(losses) == 3
