"""Stages of Ray Data: batches of a dataset go through actors that load once, such as a tokenizer or an engine's client.

`map_with_actors` adds a stage to a dataset; `run_stage` adds the last one and streams its rows.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ray.data


def map_with_actors(
    dataset: ray.data.Dataset,
    actor: type,
    kwargs: Mapping[str, Any],
    *,
    batch_size: int,
    batch_format: str = "numpy",
    num_actors: int = 1,
    calls_in_flight: int | None = None,
    bundle: Mapping[str, float] | None = None,
) -> ray.data.Dataset:
    """Return a dataset whose batches pass through a fixed pool of actors. Nothing runs yet.

    Args:
        dataset: the input.
        actor: a callable class; Ray's dashboard shows its name.
        kwargs: arguments of its constructor.
        batch_size: rows of a call.
        batch_format: `numpy` (arrays by column) or `pyarrow` (a table).
        num_actors: size of the pool.
        calls_in_flight: calls that an asynchronous actor handles at once; None for Ray Data's defaults.
        bundle: Ray resources of each actor, such as `resources.process_bundle`; None for none. Actors that mostly
            wait reserve no core, so that the engines and Ray Data keep all of them.
    """
    resources = dict(bundle or {})
    return dataset.map_batches(
        actor,
        batch_size=batch_size,
        batch_format=batch_format,
        fn_constructor_kwargs=dict(kwargs),
        compute=ray.data.ActorPoolStrategy(
            size=num_actors,
            max_tasks_in_flight_per_actor=calls_in_flight,
            max_concurrent_calls_per_actor=calls_in_flight,
        ),
        num_cpus=resources.pop("CPU", 0),
        num_gpus=resources.pop("GPU", None),
        resources=resources or None,
    )


def run_stage(
    dataset: ray.data.Dataset,
    actor: type,
    kwargs: Mapping[str, Any],
    name: str,
    *,
    batch_size: int,
    batch_format: str = "numpy",
    num_actors: int = 1,
    calls_in_flight: int | None = None,
    bundle: Mapping[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run a dataset with a last stage of actors and yield the rows that these return, such as counts for a meter.

    Args:
        dataset: the input.
        actor: as for `map_with_actors`, like all that follows the name.
        kwargs: arguments of its constructor.
        name: of the execution in Ray's dashboard.
        batch_size: rows of a call.
        batch_format: `numpy` or `pyarrow`.
        num_actors: size of the pool.
        calls_in_flight: calls that an asynchronous actor handles at once.
        bundle: Ray resources of each actor.
    """
    stage = map_with_actors(
        dataset,
        actor,
        kwargs,
        batch_size=batch_size,
        batch_format=batch_format,
        num_actors=num_actors,
        calls_in_flight=calls_in_flight,
        bundle=bundle,
    )
    stage.set_name(name)
    yield from stage.iter_rows()
