"""The loss of a micro-batch and its gradients, on a Llama with random weights."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.config.experiment import Arm
from raykd.config.sections import Teacher
from raykd.config.strategies import Prompt
from raykd.config.training import Lora, Loss, Student, Targets, Train
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
    examples = []
    for prompt, answer in ((7, 5), (3, 9), (11, 1)):
        tokens = generator.integers(0, V, prompt + answer).tolist()
        log_p = np.log(generator.dirichlet(np.ones(V), answer))
        ids = np.argsort(-log_p, axis=-1)[:, :K].copy()
        best = np.take_along_axis(log_p, ids, -1).astype(np.float32)
        example = Example("p", tokens[:prompt], tokens[prompt:])
        if soft:
            example = replace(example, topk_ids_TK=ids, topk_logprobs_TK=best)
        examples.append(example)
    return examples


def by_row(model: Any, row: Example, chosen_arm: Arm) -> torch.Tensor:
    """Return the loss of one row from the model's logits: each completion token by the logit before it."""
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
    weight = chosen_arm.loss.cross_entropy_weight
    return weight * entropy + (1 - weight) * kl


def gradients(model: Any) -> dict[str, torch.Tensor]:
    by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return by_name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("chunk_elements", [1 << 20, 4 * V])
@pytest.mark.parametrize(
    "chosen_arm",
    [arm(), arm(targets=Targets(kind="top_k", top_k=K), loss=Loss(cross_entropy_weight=0.3))],
    ids=["hard", "top_k"],
)
def test_micro_batch_loss_is_sum_of_its_rows(model, packing, chunk_elements, chosen_arm):
    examples = rows(soft=chosen_arm.targets.kind == "top_k")
    expected = sum(by_row(model, row, chosen_arm) for row in examples)
    expected.backward()
    expected_gradients = gradients(model)
    distillation = student.Distillation(model, chosen_arm, chunk_elements)
    total = distillation(batching.collate(examples, pad_token_id=0, packing=packing))
    total.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-4), name


@pytest.mark.parametrize("packing", [False, True])
def test_worker_without_rows_has_zero_loss_and_gradients(model, packing: bool):
    total = student.Distillation(model, arm())(batching.collate([], pad_token_id=0, packing=packing))
    total.backward()
    assert float(total.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


class _Largest(TorchDispatchMode):
    """Records the largest float32 tensor over the vocabulary that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32 and each.shape[-1:] == (V,):
                self.elements = max(self.elements, each.numel())
        return output


def test_float32_logits_never_exceed_a_chunk(model):
    model = model.bfloat16()
    chosen_arm = arm(targets=Targets(kind="top_k", top_k=K), loss=Loss(cross_entropy_weight=0.5))
    batch = batching.collate(rows(soft=True) * 4, pad_token_id=0, packing=False)
    assert len(batch["positions"]) == 60
    with _Largest() as largest:
        student.Distillation(model, chosen_arm, chunk_elements=8 * V)(batch).backward()
    assert largest.elements == 8 * V


def test_packed_rows_are_independent(model):
    first, second, _ = rows(soft=False)
    distillation = student.Distillation(model, arm())

    def loss_of(*examples: Example) -> float:
        return float(distillation(batching.collate(list(examples), 0, packing=True)).detach())

    assert loss_of(first, second) == pytest.approx(loss_of(first) + loss_of(second), rel=1e-5)
    assert loss_of(second, first) == pytest.approx(loss_of(first, second), rel=1e-5)


def _saved_elements(distillation: student.Distillation, batch: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Return the number of elements that a forward pass saves for the backward pass, and the loss."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = distillation(batch)
    return sum(saved.values()), loss


def test_activation_checkpointing_saves_memory_with_equal_gradients():
    results = {}
    for checkpointing in (False, True):
        chosen_arm = arm().model_copy(
            update={
                "student": Student(model="raykd/demo-student"),
                "train": Train(dtype="float32", gradient_checkpointing=checkpointing),
            }
        )
        distillation = student.build_student(chosen_arm, seed=0)
        assert all(module.training for module in distillation.modules())
        batch = batching.collate([Example("p", [5] * 60, list(range(5, 65)))], pad_token_id=0, packing=False)
        saved, loss = _saved_elements(distillation, batch)
        loss.backward()
        results[checkpointing] = saved, float(loss.detach()), gradients(distillation)
    weights = sum(parameter.numel() for parameter in distillation.parameters())
    assert results[True][0] - weights < 0.5 * (results[False][0] - weights)
    assert results[True][1] == pytest.approx(results[False][1], rel=1e-6)
    assert any(gradient.any() for gradient in results[True][2].values())
    for name, gradient in results[True][2].items():
        assert torch.allclose(gradient, results[False][2][name], atol=1e-5), name


def test_dropout_is_active_in_training():
    lora = Lora(lora_dropout=0.5)
    chosen_arm = arm().model_copy(update={"student": Student(model="raykd/demo-student", lora=lora)})
    distillation = student.build_student(chosen_arm.model_copy(update={"train": Train(dtype="float32")}), seed=0)
    for name, parameter in distillation.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batching.collate([Example("p", [5] * 6, list(range(5, 15)))], pad_token_id=0, packing=False)
    losses = {float(distillation(batch).detach()) for _ in range(3)}
    assert len(losses) == 3
