"""Table: a table of the report as text cells, for Markdown, HTML and the terminal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text cells. The columns of `text_columns` are aligned left, all others right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    text_columns: tuple[int, ...] = (0,)
    share_columns: tuple[int, ...] = ()
    """Columns of percentages, which the HTML page shows with a bar."""
