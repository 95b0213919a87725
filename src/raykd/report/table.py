"""Table: a table of the report as text cells, the same for Markdown, HTML and the terminal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text cells. Numbers are set to the right, the columns of `text_columns` to the left."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    text_columns: tuple[int, ...] = (0,)
    share_columns: tuple[int, ...] = ()
    """Columns of percentages, for which the page draws a bar."""
