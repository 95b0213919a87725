"""Stages of Ray Data: batches of a dataset go through actors that load once, such as a tokenizer or an engine's client.

`map_with_actors` adds a stage to a dataset; `run_stage` adds the last one and runs them all.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
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
    on_row: Callable[[dict[str, Any]], None],
    *,
    batch_size: int,
    batch_format: str = "numpy",
    num_actors: int = 1,
    calls_in_flight: int | None = None,
    bundle: Mapping[str, float] | None = None,
) -> None:
    """Run a dataset with a last stage of actors. The execution has ended when this returns or raises.

    Args:
        dataset: the input.
        actor: as for `map_with_actors`, like the keyword arguments.
        kwargs: arguments of its constructor.
        name: of the execution in Ray's dashboard.
        on_row: called in this process with each row that the stage returns, such as the counts of a call.
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

    def returned_rows() -> Generator[dict[str, Any]]:
        yield from stage.iter_rows()

    # An exception in `on_row`, such as a signal's, holds the iterator in its traceback. Left open, the iterator would
    # end its execution after Ray's shutdown, print a traceback, and connect to another cluster of this machine.
    with closing(returned_rows()) as rows:
        for row in rows:
            on_row(row)
