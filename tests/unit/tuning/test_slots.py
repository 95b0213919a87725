"""Trial slots: the number of trials that fit the cluster, and requests for more nodes."""

from pathlib import Path

import pytest

from cloud_files import write_two_pools
from raykd.cluster import nodes
from raykd.config.training import Train
from raykd.tuning import slots
from raykd.tuning.slots import AutoscalerRequester, TrialSlots, WorkerGroup, num_trial_slots


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Resources of a cluster of eight cores, which a test can change; the autoscaler's limits are unknown."""
    monkeypatch.delenv("RAYKD_CLUSTER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    resources = {"CPU": 8.0}
    monkeypatch.setattr(slots, "current_resources", lambda: resources)
    return resources


def test_slots_hold_the_largest_trial():
    groups = [WorkerGroup(Train(num_workers=1), "cpu"), WorkerGroup(Train(num_workers=3, batch_size=24), "cpu")]
    assert num_trial_slots(groups[:1], {}, None) == 8
    assert num_trial_slots(groups, {}, None) == 2
    assert num_trial_slots(groups, {"CPU": 3.0}, None) == 1
    assert num_trial_slots(groups[:1], {}, 4) == 4


def test_slots_follow_the_cluster_and_request_one_trial_more(cluster: dict[str, float]):
    requests: list[int] = []
    requester = AutoscalerRequester(
        lambda bundles: requests.append(len(bundles)), trial_bundles=[{"CPU": 1.0}] * 2, min_workers=2, max_trials=9
    )
    trial_slots = TrialSlots([WorkerGroup(Train(num_workers=2), "cpu")], {}, None, requester)
    assert trial_slots.update(9) == 4
    cluster["CPU"] = 4.0
    assert trial_slots.update(9) == 2
    # The last trial needs no further node.
    assert trial_slots.update(1) == 2
    assert requests == [2 * 5, 2 * 3, 2 * 1]


def first_request(
    workers: list[nodes.Bundle], min_workers: int, max_trials: int, other_groups: tuple[list[nodes.Bundle], ...] = ()
) -> list[nodes.Bundle]:
    """Return the bundles that are requested for trials with these workers when no trial fits."""
    requests: list[list[nodes.Bundle]] = []
    AutoscalerRequester(
        lambda bundles: requests.append(list(bundles)),
        trial_bundles=workers,
        min_workers=min_workers,
        other_groups=list(other_groups),
        max_trials=max_trials,
    ).update(0, max_trials)
    (request,) = requests
    return request


def test_requests_stay_within_autoscaler_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_two_pools(tmp_path / "cluster.yaml")
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "cluster.yaml"))
    workers = [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:A10G": 0.001}] * 4
    assert first_request(workers, min_workers=4, max_trials=21) == workers * 4
    assert first_request(workers, min_workers=4, max_trials=2) == workers * 2
    # The teacher stays up, so the request includes it.
    teacher = [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}] * 8
    untyped = [{"CPU": 1.0, "GPU": 1.0}] * 8
    assert first_request(untyped, 8, 21, (teacher,)) == [*teacher, *untyped * 3]


def test_elastic_trial_requests_as_many_workers_as_the_limits_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_two_pools(tmp_path / "cluster.yaml")
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "cluster.yaml"))
    # The limits allow sixteen of these workers.
    workers = [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:A10G": 0.001}] * 24
    assert first_request(workers, min_workers=4, max_trials=3) == workers[:16]
    assert first_request(workers, min_workers=24, max_trials=3) == workers


def test_without_limits_one_more_trial_is_requested(monkeypatch: pytest.MonkeyPatch):
    requests: list[int] = []
    now = [100.0]
    monkeypatch.setattr(slots.time, "monotonic", lambda: now[0])
    requester = AutoscalerRequester(
        lambda bundles: requests.append(len(bundles)), trial_bundles=[{"CPU": 1.0}] * 2, min_workers=2, max_trials=3
    )
    for num_slots in (0, 0, 1, 1, 2, 5):
        requester.update(num_slots, 9)
    assert requests == [2, 4, 6]
    # The request is repeated, because another experiment may have replaced it.
    now[0] += 61
    requester.update(5, 9)
    assert requests == [2, 4, 6, 6]
    # Fewer trials are left than fit.
    requester.update(5, 1)
    assert requests == [2, 4, 6, 6, 2]
