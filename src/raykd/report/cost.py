"""Report cost: the teacher's completions, processor time and money."""

from collections.abc import Mapping
from typing import Any

from raykd.analysis.scores import Proportion
from raykd.analysis.statistics import wilson_interval
from raykd.config.errors import validated
from raykd.config.sections import Prices
from raykd.report.results import Results
from raykd.report.table import Table
from raykd.report.text import amount, duration, percent
from raykd.report.trials import finite
from raykd.storage.paths import ExperimentPaths

TRAIN_ROLE = "train"


def teacher_generated(results: Results) -> list[Mapping[str, Any]]:
    """Return the completion sets that the teacher generated, without those that it only scored."""
    return [completions for completions in results.run.completions if completions.get("source", "teacher") == "teacher"]


def teacher_share(completions: Mapping[str, Any]) -> Proportion:
    """Return the teacher's strict accuracy on a completion set, errors excluded.

    The interval's n is the number of problems, because samples of a problem are not independent of each other.
    """
    answered, correct = answered_rows(completions), completions.get("correct")
    if not answered or correct is None:
        return Proportion()
    problems = max(1, answered // (completions.get("num_samples") or 1))
    return Proportion(correct / answered, *wilson_interval(correct / answered * problems, problems))


def answered_rows(completions: Mapping[str, Any]) -> int:
    """Return the number of completions without an error."""
    return (completions.get("rows") or 0) - (completions.get("errors") or 0)


def cost(results: Results) -> Table:
    """Return the tokens and the time of each completion set."""
    rows = []
    for completions in results.run.completions:
        # A teacher that returns text alone has no token count.
        tokens = finite(completions.get("completion_tokens")) or None
        seconds, truncated = finite(completions.get("seconds")), finite(completions.get("truncated"))
        answered = answered_rows(completions)
        rows.append(
            [
                str(completions.get("strategy", "")),
                str(completions.get("teacher", "")),
                str(completions.get("source", "teacher")),
                amount(completions.get("rows")),
                amount(completions.get("errors")),
                percent(truncated / answered if truncated is not None and answered else None),
                amount(tokens),
                amount(tokens / answered if tokens is not None and answered else None, 1),
                duration(seconds),
                amount(tokens / seconds if tokens is not None and seconds else None),
            ]
        )
    return Table(
        "Teacher cost",
        [
            "Strategy",
            "Teacher",
            "Source",
            "Rows",
            "Errors",
            "Truncated %",
            "Tokens",
            "Tokens per row",
            "Time",
            "Tokens per second",
        ],
        rows,
        "Source is the author of the text: the teacher generated its own completions, and scored reference solutions "
        "and student answers token by token. Completions are stored by content key, so a strategy that an earlier run "
        "completed costs nothing again.",
        text_columns=(0, 1, 2),
    )


def stages(results: Results) -> Table:
    """Return the wall-clock time of each stage."""
    seconds = results.run.stages
    rows = [[str(stage), duration(finite(value))] for stage, value in seconds.items()]
    return Table("Time by stage", ["Stage", "Time"], rows)


def processors(results: Results) -> Table:
    """Return the processor time of each section of the configuration, and its cost where prices are configured."""
    prices = validated(Prices, results.tree.get("prices") or {}, f"{ExperimentPaths(results.folder).config}: prices")
    columns = ["Section", "Processor", "Processor-seconds (at most)", "Processor-hours (at most)"]
    note = (
        "By section of the configuration; on-policy students answer with the engine of `evaluate`, too. "
        "Processors multiplied by the seconds for which they were reserved, model loading included. An autoscaled "
        "teacher counts with its maximum number of replicas all the time. On a CPU an engine may use more cores than "
        "the one that it reserves. Training counts from the first to the last step of each trial, without killed "
        "attempts."
    )
    rows, costs = [], []
    for section, kinds in _processor_seconds(results).items():
        for kind, seconds in kinds.items():
            hours, price = seconds / 3600, prices.per_hour(kind, is_teacher=section == "teacher")
            rows.append([section, kind.upper(), amount(seconds), amount(hours, 2)])
            costs.append(None if price is None else hours * price)
    known = [price for price in costs if price is not None]
    if not known:
        note += " Set `prices.gpu_hour` or `prices.cpu_hour` in the experiment to add the cost."
        return Table("Processor time", columns, rows, note, text_columns=(0, 1))
    rows = [[*row, amount(price, 2)] for row, price in zip(rows, costs, strict=True)]
    if len(rows) > 1 and sum(known):
        label = "all" if len(known) == len(costs) else "all with a price"
        rows.append([label, "", "", "", amount(sum(known), 2)])
    return Table("Processor time", [*columns, f"Cost, {prices.currency} (at most)"], rows, note, text_columns=(0, 1))


def _processor_seconds(results: Results) -> dict[str, dict[str, float]]:
    """Return the processor-seconds by section and by kind of processor, training included."""
    usage: dict[str, dict[str, float]] = {
        section: {kind: float(seconds) for kind, seconds in kinds.items()}
        for section, kinds in results.run.processor_seconds.items()
    }
    for trial in results.trials:
        if trial.train_seconds is not None and trial.num_workers and trial.accelerator:
            training = usage.setdefault(TRAIN_ROLE, {})
            seconds = trial.train_seconds * trial.num_workers
            training[trial.accelerator] = training.get(trial.accelerator, 0.0) + seconds
    return usage
