"""Selection: which of a problem's completions are trained on, and why the others are not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raykd.sections import Targets

Row = Mapping[str, Any]


def select(completions: Sequence[Row], targets: Targets) -> tuple[list[Row], Counter[str]]:
    """Picks among the completions of one problem.

    Args:
        completions: rows of `records.COMPLETION`, in the order of their samples.
        targets: what is kept.

    Returns:
        The rows to train on, in the same order, and how many were dropped for which reason: `error`, `empty`,
        `duplicate`, `incorrect`, `not_best`.
    """
    dropped: Counter[str] = Counter()
    kept: list[Row] = []
    seen: set[tuple[int, ...] | str] = set()
    for row in completions:
        words = _words(row)
        reason = ""
        if row["error"]:
            reason = "error"
        elif not words:
            reason = "empty"
        elif targets.deduplicate and words in seen:
            reason = "duplicate"
        elif targets.keep == "correct" and not row["is_correct"]:
            reason = "incorrect"
        seen.add(words)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    if targets.keep == "best" and len(kept) > 1:
        dropped["not_best"] += len(kept) - 1
        kept = [min(kept, key=_worse)]
    return kept, dropped


def _worse(row: Row) -> tuple[bool, bool, int]:
    return not row["is_correct"], row["finish_reason"] != "stop", len(_words(row))


def _words(row: Row) -> tuple[int, ...] | str:
    """What a completion says: its tokens, or the text where that is all that the teacher gave."""
    return tuple(row["completion_token_ids"]) or row["completion"]
