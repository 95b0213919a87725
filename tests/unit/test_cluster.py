"""Cluster: what is set in Ray without being part of its public interface."""

from ray.data import DataContext

from raykd import cluster


def test_ray_data_still_has_the_number_of_blocks_that_a_task_hands_on():
    """A name that it did not know would be set all the same, and the teacher be asked twenty calls a second again."""
    assert hasattr(DataContext(), "_max_num_blocks_in_streaming_gen_buffer")


def test_gpus_are_counted_by_their_kind_too():
    head, h100 = {"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    found = cluster._total([(head, 1), (h100, 2), ({"CPU": 16, "GPU": 4, "accelerator_type:A10G": 1}, 3)])
    assert {name: found[name] for name in ("CPU", "GPU", "GPU:H100", "GPU:A10G")} == {
        "CPU": 8 + 192 + 48,
        "GPU": 28,
        "GPU:H100": 16,
        "GPU:A10G": 12,
    }
