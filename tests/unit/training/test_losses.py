"""Losses against a float64 numpy oracle that is independent of torch."""

import numpy as np
import pytest
import torch

from raykd.training import losses

N, V = 40, 23
KINDS = sorted(losses.DIVERGENCES)
MISSING_MASS = ["bucket", "renormalize"]


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


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Sum the definition over outcomes."""
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-12)


def by_definition(kind: str, p: np.ndarray, q: np.ndarray) -> float:
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    middle = (p + q) / 2
    return kl(p, middle) / 2 + kl(q, middle) / 2


def oracle(
    kind: str, student: np.ndarray, ids: np.ndarray, log_p: np.ndarray, missing_mass: str, temperature: float = 1.0
) -> float:
    """Compute a divergence row by row from the student's whole distribution: merge or drop all but the k tokens."""
    total = 0.0
    for row in range(len(student)):
        p = np.exp(log_p[row]) ** (1 / temperature)
        q = np.exp(log_softmax(student[row] / temperature))
        if missing_mass == "bucket" and len(p) < V:
            others = [token for token in range(V) if token not in ids[row]]
            p, q = np.append(p, 1 - p.sum()), np.append(q[ids[row]], q[others].sum())
        else:
            p, q = p / p.sum(), q[ids[row]] / q[ids[row]].sum()
        total += by_definition(kind, p, q)
    return total * temperature**2


def value_and_gradient(
    kind: str, student: np.ndarray, ids: np.ndarray, log_p: np.ndarray, missing_mass: str, temperature: float = 1.0
) -> tuple[float, np.ndarray]:
    """Return the value of `losses.divergence`, and its gradient with respect to the logits."""
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    log_p32 = torch.tensor(log_p, dtype=torch.float32)
    value = losses.divergence(kind, logits, torch.tensor(ids), log_p32, missing_mass, temperature)  # type: ignore[arg-type]
    value.backward()
    assert logits.grad is not None
    return float(value.detach()), logits.grad.numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing_mass", MISSING_MASS)
@pytest.mark.parametrize("k", [2, 4, 16, V])
def test_divergence_matches_definition(student_and_teacher, kind: str, missing_mass: str, k: int):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, k)
    assert value_and_gradient(kind, student, ids, log_p, missing_mass)[0] == pytest.approx(
        oracle(kind, student, ids, log_p, missing_mass), rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing_mass", MISSING_MASS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.9])
def test_divergence_over_the_whole_vocabulary_is_dense(
    student_and_teacher, kind: str, missing_mass: str, temperature: float
):
    student, teacher = student_and_teacher
    p, q = np.exp(log_softmax(teacher / temperature)), np.exp(log_softmax(student / temperature))
    dense = sum(by_definition(kind, *row) for row in zip(p, q, strict=True)) * temperature**2
    assert value_and_gradient(kind, student, *top_k(teacher, V), missing_mass, temperature)[0] == pytest.approx(
        dense, rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_applies_to_the_top_k(student_and_teacher, kind: str):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, 6)
    value, _ = value_and_gradient(kind, student, ids, log_p, "renormalize", 3.0)
    assert value == pytest.approx(oracle(kind, student, ids, log_p, "renormalize", 3.0), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_k_never_raises_the_divergence(student_and_teacher, kind: str):
    student, teacher = student_and_teacher
    values = [value_and_gradient(kind, student, *top_k(teacher, k), "bucket")[0] for k in (1, 4, 16, V)]
    assert values == sorted(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing_mass", MISSING_MASS)
@pytest.mark.parametrize("k", [1, 4, V])
def test_divergence_of_equal_distributions_is_zero_and_minimal(student_and_teacher, kind, missing_mass, k):
    _, teacher = student_and_teacher
    value, gradient = value_and_gradient(kind, teacher, *top_k(teacher, k), missing_mass)
    assert value == pytest.approx(0, abs=1e-4)
    assert np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("missing_mass", "temperature"), [("bucket", 1.0), ("renormalize", 1.0), ("renormalize", 2.5)])
def test_gradient_matches_finite_differences(student_and_teacher, kind: str, missing_mass: str, temperature: float):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, 4)
    _, gradient = value_and_gradient(kind, student, ids, log_p, missing_mass, temperature)
    step = 1e-5
    for row, column in [(0, 0), (3, int(ids[3, 0])), (7, int(ids[7, 3])), (11, 22)]:
        up, down = student.copy(), student.copy()
        up[row, column] += step
        down[row, column] -= step
        slope = oracle(kind, up, ids, log_p, missing_mass, temperature) - oracle(
            kind, down, ids, log_p, missing_mass, temperature
        )
        assert gradient[row, column] == pytest.approx(slope / (2 * step), abs=2e-4)


@pytest.mark.parametrize("rest", [1e-4, 1e-6, 1e-8, 1e-12])
def test_overconfident_student_has_gradient(rest: float):
    """The gradient of forward KL to the bucket's logits is q - p, however small q is."""
    ids = np.arange(3)[None]
    q = np.concatenate([np.full(3, (1 - rest) / 3), np.full(V - 3, rest / (V - 3))])
    p = np.array([0.5, 0.3, 0.199])
    _, gradient = value_and_gradient("forward_kl", np.log(q)[None], ids, np.log(p)[None], "bucket")
    assert gradient[0, 3:].sum() == pytest.approx(rest - (1 - p.sum()), rel=1e-3)
    assert gradient[0, :3] == pytest.approx(q[:3] - p, rel=1e-3)


def test_jensen_shannon_is_bounded_and_symmetric(student_and_teacher):
    student, teacher = (30 * logits for logits in student_and_teacher)
    value, _ = value_and_gradient("jensen_shannon", student, *top_k(teacher, V), "bucket")
    assert 0 < value <= N * np.log(2) * (1 + 1e-5)
    assert value == pytest.approx(
        value_and_gradient("jensen_shannon", teacher, *top_k(student, V), "bucket")[0], rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing_mass", MISSING_MASS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_is_finite_for_extreme_logits(student_and_teacher, kind: str, missing_mass: str, dtype: torch.dtype):
    student, teacher = student_and_teacher
    ids, log_p = top_k(teacher, 4)
    log_p[0, 1:] = -np.inf
    log_p[0, 0] = 0.0
    # The student's whole mass is on the teacher's tokens.
    student[1, :] = -1e4
    student[1, ids[1]] = 0
    # It has no mass on the teacher's tokens; their logits are -inf.
    student[2, ids[2]] = -np.inf
    student[3, :] = -np.inf
    student[3, ids[3, 0]] = 0
    logits = torch.tensor(student, dtype=dtype, requires_grad=True)
    value = losses.divergence(kind, logits, torch.tensor(ids), torch.tensor(log_p, dtype=torch.float32), missing_mass)  # type: ignore[arg-type]
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits_are_computed_in_float32(student_and_teacher, kind: str):
    student, teacher = student_and_teacher
    rounded = torch.tensor(student, dtype=torch.bfloat16)
    ids, log_p = top_k(teacher, 4)
    value = losses.divergence(kind, rounded, torch.tensor(ids), torch.tensor(log_p, dtype=torch.float32))
    expected = oracle(kind, rounded.double().numpy(), ids, log_p, "bucket")
    assert float(value) == pytest.approx(expected, rel=1e-4)


def test_bucket_with_temperature_is_refused(student_and_teacher):
    student, teacher = student_and_teacher
    with pytest.raises(AssertionError, match="bucket"):
        value_and_gradient("forward_kl", student, *top_k(teacher, 4), "bucket", 2.0)


def test_cross_entropy_is_the_sum_of_negative_log_probabilities(student_and_teacher):
    student, _ = student_and_teacher
    tokens = np.arange(N) % V
    expected = -log_softmax(student)[np.arange(N), tokens].sum()
    value = losses.cross_entropy(torch.tensor(student, dtype=torch.float32), torch.tensor(tokens))
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing_mass", MISSING_MASS)
def test_losses_of_no_tokens_are_zero(kind: str, missing_mass: str):
    assert (
        value_and_gradient(kind, np.zeros((0, V)), np.zeros((0, 4), dtype=int), np.zeros((0, 4)), missing_mass)[0] == 0
    )
    logits = torch.zeros((0, V), requires_grad=True)
    assert float(losses.cross_entropy(logits, torch.zeros(0, dtype=torch.long)).detach()) == 0
