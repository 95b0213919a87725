"""Rates: how fast the stages go, as it is told or as an earlier run measured it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from raykd import config, job, location, storage
from raykd.run_file import read_run


@dataclass(frozen=True)
class Rates:
    """Tokens a second, None where it is not known. Loading of models is in them where a run measured them."""

    generation: float | None = None
    """Completion tokens of one replica of the teacher."""
    training: float | None = None
    """Target tokens of one training worker."""
    answering: float | None = None
    """Tokens that the engine of the students writes."""
    completion_tokens: float | None = None
    """Tokens of a completion of the teacher, in the mean."""
    answer_tokens: float | None = None
    """Tokens of a student's answer, in the mean."""
    accelerator: str = "gpu"
    """What they are of: `gpu` or `cpu`."""
    source: str = "as told"


def measured(folder: Path) -> Rates:
    """The rates of an earlier run.

    Args:
        folder: the experiment's, with `run.json`.

    Raises:
        UserError: where it is not the folder of a run, or what it wrote is damaged.
    """
    run = read_run(folder)
    file = folder / "experiment.yaml"
    replicas = config.load(file).teacher.replicas.max if file.is_file() else 1
    # Solutions are scored in the same stream, and each set's seconds are an equal share of all.
    together = [each for each in run.completions if each.get("sequence") != "student"]
    made = [each for each in together if each.get("sequence") != "reference"]
    tokens, seconds = _sum(made, "completion_tokens"), _sum(together, "seconds")
    rows = _sum(made, "rows") - _sum(made, "errors")
    curves = [job.read_curve(each) for each in location.in_each(folder / "trials", "metrics.jsonl")]
    ends = [curve[-1] for curve in curves if curve]
    trained = _sum(ends, "target_tokens")
    worked = sum(float(each.get("seconds") or 0) * float(each.get("num_workers") or 1) for each in ends)
    answers, answered = _answers(folder / "predictions.parquet")
    answering = run.stages.get("predictions", 0.0)
    held = {kind for kinds in run.processor_seconds.values() for kind in kinds}
    return Rates(
        generation=_ratio(tokens, seconds * replicas),
        training=_ratio(trained, worked),
        answering=_ratio(answered, answering),
        completion_tokens=_ratio(tokens, rows),
        answer_tokens=_ratio(answered, answers),
        accelerator="cpu" if held == {"cpu"} else "gpu",
        source=f"measured in {folder}",
    )


def _answers(file: Path) -> tuple[int, float]:
    """How many answers there are that did not fail, and their tokens."""
    if not file.is_file():
        return 0, 0.0
    table = storage.read_table(file, ["num_tokens", "error"])
    table = table.filter(pc.equal(table["error"], ""))  # pyright: ignore[reportAttributeAccessIssue]
    return len(table), float(sum(table["num_tokens"].to_pylist()))


def _sum(entries: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(float(each.get(name) or 0) for each in entries)


def _ratio(amount: float, of: float) -> float | None:
    return amount / of if amount and of else None
