"""Losses against an oracle in float64 numpy that knows nothing of torch's functions."""

import numpy as np
import pytest
import torch

from raykd import losses

N, V = 40, 23


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def student_and_teacher() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(0, 3, (N, V)), generator.normal(0, 3, (N, V))


def top_k(teacher: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    log_p = log_softmax(teacher)
    ids = np.argsort(-log_p, axis=-1)[:, :k].copy()
    return ids, np.take_along_axis(log_p, ids, -1)


def oracle(student: np.ndarray, ids: np.ndarray, log_p: np.ndarray) -> float:
    """KL over the k best and one bucket for the rest, row by row, by its definition."""
    log_q, total = log_softmax(student), 0.0
    for row in range(len(student)):
        p = [float(np.exp(value)) for value in log_p[row]]
        q = [float(np.exp(log_q[row, token])) for token in ids[row]]
        p.append(max(1 - sum(p), 0.0))
        q.append(1 - sum(q))
        total += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-12)
    return total


def kl(student: np.ndarray, ids: np.ndarray, log_p: np.ndarray) -> torch.Tensor:
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    return losses.forward_kl(logits, torch.tensor(ids), torch.tensor(log_p, dtype=torch.float32))


@pytest.mark.parametrize("k", [1, 4, 16])
def test_forward_kl_over_the_top_k_and_the_rest(student_and_teacher, k: int):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, k)
    assert float(kl(student, ids, log_p)) == pytest.approx(oracle(student, ids, log_p), rel=1e-4)


def test_with_every_token_it_is_the_dense_divergence(student_and_teacher):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, V)
    log_p_dense, log_q_dense = log_softmax(teacher), log_softmax(student)
    dense = (np.exp(log_p_dense) * (log_p_dense - log_q_dense)).sum()
    assert float(kl(student, ids, log_p)) == pytest.approx(dense, rel=1e-4)


def test_fewer_tokens_never_raise_it(student_and_teacher):
    student, teacher = student_and_teacher
    values = [float(kl(student, *top_k(teacher, k))) for k in (1, 4, 16, V)]
    assert values == sorted(values)


def test_it_is_zero_where_student_and_teacher_agree(student_and_teacher):
    _, teacher = student_and_teacher
    for k in (4, V):
        value = kl(teacher, *top_k(teacher, k))
        assert float(value) == pytest.approx(0, abs=1e-3)


def test_its_gradient_agrees_with_finite_differences(student_and_teacher):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, 4)
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    losses.forward_kl(logits, torch.tensor(ids), torch.tensor(log_p, dtype=torch.float32)).backward()
    assert logits.grad is not None
    step = 1e-5
    for row, column in [(0, 0), (3, int(ids[3, 0])), (7, int(ids[7, 3])), (11, 22)]:
        up, down = student.copy(), student.copy()
        up[row, column] += step
        down[row, column] -= step
        slope = (oracle(up, ids, log_p) - oracle(down, ids, log_p)) / (2 * step)
        assert float(logits.grad[row, column]) == pytest.approx(slope, abs=1e-4)


def test_it_stays_finite_at_the_edges(student_and_teacher):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, 4)
    log_p[0, 1:] = -np.inf
    log_p[0, 0] = 0.0
    # All of the student's mass on the teacher's tokens, none left for the rest.
    student[1, :] = -1e4
    student[1, ids[1]] = 0
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor(student, dtype=dtype, requires_grad=True)
        value = losses.forward_kl(logits, torch.tensor(ids), torch.tensor(log_p, dtype=torch.float32))
        value.backward()
        assert torch.isfinite(value)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_cross_entropy_is_the_sum_of_minus_log_probability(student_and_teacher):
    student, _ = student_and_teacher
    tokens = np.arange(N) % V
    expected = -log_softmax(student)[np.arange(N), tokens].sum()
    value = losses.cross_entropy(torch.tensor(student, dtype=torch.float32), torch.tensor(tokens))
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_train_on_is_worth_nothing():
    logits = torch.zeros((0, V), requires_grad=True)
    assert float(losses.cross_entropy(logits, torch.zeros(0, dtype=torch.long))) == 0
    assert float(losses.forward_kl(logits, torch.zeros((0, 4), dtype=torch.long), torch.zeros((0, 4)))) == 0
