"""The examples of a trial or of one of its rounds, and the order in which training steps use them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raykd.errors import UserError
from raykd.training import examples, schedule
from raykd.training.examples import Example
from raykd.training.trial import TrialSpec, problem_ids, problem_ids_of_round


@dataclass(frozen=True)
class TrainingData:
    """Examples, and the optimizer steps of the whole training."""

    rows: list[Example | None]
    """None for a problem without an example in this round."""
    dropped: dict[str, int]
    """Number of excluded completions by reason."""
    steps: list[tuple[int, list[int]]]
    """Epoch and row numbers of each optimizer step."""

    @property
    def num_examples(self) -> int:
        return len(self.rows) - self.rows.count(None)

    def examples(self, row_numbers: list[int]) -> list[Example]:
        """Return the examples of some rows, without the missing ones."""
        return [row for number in row_numbers if (row := self.rows[number]) is not None]

    def num_target_tokens(self, row_numbers: list[int]) -> int:
        """Return the number of completion tokens of some rows."""
        return sum(len(row.completion_token_ids) for row in self.examples(row_numbers))


def no_examples(trial: TrialSpec, dropped: Mapping[str, int]) -> UserError:
    """Return the error of a trial without an example to train on.

    Args:
        trial: the trial.
        dropped: number of excluded completions by reason, of the last round if there are several.
    """
    counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items())
    return UserError(
        f"trial {trial.trial_id}: every example was filtered out ({counts}); change targets.filter, train.max_length "
        "or the sampling"
    )


def load_training_data(trial: TrialSpec, tokenizer: Any) -> TrainingData:
    """Build the examples of a trial, or of its current round.

    Args:
        trial: the trial.
        tokenizer: the student's.

    Raises:
        UserError: a trial without rounds has no example.
    """
    selected_ids = None if trial.round is None else problem_ids_of_round(trial, trial.round)
    rows, dropped = examples.build_examples(
        trial.arm, trial.problems, trial.completions, tokenizer, trial.same_tokens, selected_ids
    )
    ordered_rows: list[Example | None] = list(rows)
    if trial.round is not None:
        # The order of training is defined over all problems, whichever of them belong to this round.
        by_problem = {row.problem_id: row for row in rows}
        ordered_rows = [by_problem.get(problem_id) for problem_id in problem_ids(trial)]
    elif not rows:
        # A single round may have no example; the last round checks the training as a whole.
        raise no_examples(trial, dropped)
    train = trial.arm.train
    steps = schedule.training_order(len(ordered_rows), train.batch_size, train.epochs, trial.seed)
    return TrainingData(ordered_rows, dropped, list(steps))
