"""Trial slots: how many trials fit the cluster, and the request for more nodes."""

import pytest

from raykd.config.training import Train
from raykd.tuning import slots
from raykd.tuning.slots import AutoscalerRequester, TrialSlots, WorkerGroup, num_trial_slots


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Eight cores, of which a test may change the number, and an autoscaler of unknown size."""
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
