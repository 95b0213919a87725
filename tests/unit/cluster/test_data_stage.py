"""A stage of Ray Data: rows, and the end of an interrupted execution."""

from collections.abc import Iterator
from typing import Any

import pytest

from raykd.cluster import data_stage


class Stage:
    """A dataset that records when its iteration ends."""

    is_open = False

    def set_name(self, name: str) -> None:
        self.name = name

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        self.is_open = True
        try:
            yield from ({"rows": number} for number in range(3))
        finally:
            self.is_open = False


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(data_stage, "map_with_actors", lambda *args, **kwargs: stage)
    return stage


def run(stage: Stage, on_row: Any) -> None:
    data_stage.run_stage(stage, dict, {}, "a name", on_row, batch_size=1)  # pyright: ignore[reportArgumentType]


def test_every_row_is_passed_to_callback(stage: Stage):
    rows: list[dict[str, Any]] = []
    run(stage, rows.append)
    assert (stage.name, rows) == ("a name", [{"rows": 0}, {"rows": 1}, {"rows": 2}])


def test_interrupted_execution_ends_before_exception_propagates(stage: Stage):
    def interrupt(_: dict[str, Any]) -> None:
        assert stage.is_open
        raise KeyboardInterrupt

    # A reference to the exception keeps the frames of its traceback alive, as in the caller of a run.
    with pytest.raises(KeyboardInterrupt) as caught:
        run(stage, interrupt)
    assert not stage.is_open
    assert caught.value.__traceback__
