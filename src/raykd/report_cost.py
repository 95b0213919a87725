"""Report cost: what the teacher did and how well, what processors were held and what that cost."""

from collections.abc import Mapping
from typing import Any

from raykd.measured import Share
from raykd.mistakes import validated
from raykd.report_text import amount, duration, percent
from raykd.results import Results
from raykd.sections import Prices
from raykd.statistics import wilson_interval
from raykd.table import Table
from raykd.trial import finite

TRAINING = "training"


def written_by_the_teacher(results: Results) -> list[Mapping[str, Any]]:
    """The sets of completions that the teacher wrote, without those that it scored only."""
    made = results.run.completions
    return [each for each in made if each.get("sequence", "teacher") == "teacher"]


def teacher_share(made: Mapping[str, Any]) -> Share:
    """The teacher's own strict accuracy over the completions of one content key, errors left out.

    The interval's n is the number of problems, which several samples of each only repeat.
    """
    answered, correct = answered_rows(made), made.get("correct")
    if not answered or correct is None:
        return Share()
    problems = max(1, answered // (made.get("samples") or 1))
    return Share(correct / answered, *wilson_interval(correct / answered * problems, problems))


def answered_rows(made: Mapping[str, Any]) -> int:
    """How many completions there are that did not fail."""
    return (made.get("rows") or 0) - (made.get("errors") or 0)


def cost(results: Results) -> Table:
    """What the teacher's completions cost."""
    rows = []
    for made in results.run.completions:
        # A teacher that gives text alone leaves its tokens uncounted.
        tokens, seconds = finite(made.get("completion_tokens")) or None, finite(made.get("seconds"))
        answered, cut = answered_rows(made), finite(made.get("truncated"))
        rows.append(
            [
                str(made.get("strategy", "")),
                str(made.get("teacher", "")),
                str(made.get("sequence", "teacher")),
                amount(made.get("rows")),
                amount(made.get("errors")),
                percent(cut / answered if cut is not None and answered else None),
                amount(tokens),
                amount(tokens / answered if tokens is not None and answered else None, 1),
                duration(seconds),
                amount(tokens / seconds if tokens is not None and seconds else None),
            ]
        )
    return Table(
        "Cost of the teacher",
        ["Strategy", "Teacher", "Text", "Rows", "Errors", "Cut %", "Tokens", "Tokens a row", "Time", "Tokens a second"],
        rows,
        "Text: whose it is; the teacher wrote its own, and scored the reference solutions and the students' answers "
        "token by token. Completions are kept by content: a strategy that an earlier run asked costs nothing again.",
        text_columns=(0, 1, 2),
    )


def stages(results: Results) -> Table:
    """Where the time went."""
    stages = results.run.stages
    return Table("Time by stage", ["Stage", "Time"], [[str(k), duration(finite(v))] for k, v in stages.items()])


def processors(results: Results) -> Table:
    """Who held how many processors for how long, and what that cost where prices are given."""
    held: dict[str, dict[str, float]] = {
        role: {kind: float(seconds) for kind, seconds in kinds.items()}
        for role, kinds in results.run.processor_seconds.items()
    }
    for trial in results.trials:
        if trial.train_seconds is not None and trial.num_workers and trial.accelerator:
            of_role = held.setdefault(TRAINING, {})
            seconds = of_role.get(trial.accelerator, 0.0) + trial.train_seconds * trial.num_workers
            of_role[trial.accelerator] = seconds
    prices = validated(Prices, results.tree.get("prices") or {}, f"{results.folder / 'experiment.yaml'}: prices")
    rows, total, is_priced = [], 0.0, True
    for role, kinds in held.items():
        for kind, seconds in kinds.items():
            price = _price(prices, role, kind)
            is_priced &= price is not None
            total += seconds / 3600 * (price or 0.0)
            money = amount(seconds / 3600 * price, 2) if price is not None else "–"
            rows.append([role, kind.upper(), amount(seconds), amount(seconds / 3600, 2), money])
    if len(rows) > 1 and total:
        rows.append(["all" if is_priced else "all that have a price", "", "", "", amount(total, 2)])
    columns = ["Held by", "Processors", "Seconds, at most", "Hours, at most", f"Cost, {prices.currency}, at most"]
    has_prices = any(_price(prices, role, kind) is not None for role, kinds in held.items() for kind in kinds)
    if not has_prices:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(
        "Processors",
        columns,
        rows,
        "Processors times the seconds for which they were held, loading of models included; a teacher that scales "
        "counts with all its replicas all the time. On a CPU an engine may use more cores than the one that it holds. "
        "Training: from a trial's first step to its last. Attempts that were killed are not in it."
        + ("" if has_prices else " With prices.gpu_hour or prices.cpu_hour in the experiment there is a cost as well."),
        text_columns=(0, 1),
    )


def _price(prices: Prices, role: str, kind: str) -> float | None:
    if (role, kind) == ("teacher", "gpu") and prices.teacher_gpu_hour is not None:
        return prices.teacher_gpu_hour
    return prices.gpu_hour if kind == "gpu" else prices.cpu_hour
