"""Cluster: what is set in Ray without being part of its public interface."""

from ray.data import DataContext


def test_ray_data_still_has_the_number_of_blocks_that_a_task_hands_on():
    """A name that it did not know would be set all the same, and the teacher be asked twenty calls a second again."""
    assert hasattr(DataContext(), "_max_num_blocks_in_streaming_gen_buffer")
