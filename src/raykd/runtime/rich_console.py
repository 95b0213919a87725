"""Rich console: a console of rich for tables, with text from outside made safe for the terminal."""

from collections.abc import Iterable
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.text import Text

from raykd.display import display
from raykd.runtime.console import Output


class SafeConsole(Console):
    """A console whose cells cannot control the terminal, and which never fails because its output cannot be written.

    Args:
        stream: the stream to write to.
        options: further arguments of rich's console.
    """

    def __init__(self, stream: TextIO | Output, **options: Any) -> None:
        output = stream if isinstance(stream, Output) else Output(stream)
        super().__init__(file=cast(TextIO, output), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render like rich, with non-printable characters as escape sequences."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else display(segment.text, multiline=True)
            yield Segment(text, segment.style, segment.control)


def cell(text: object) -> Text:
    """Return a text for a table: rich parses no markup in it, and its width is that of what is shown."""
    return Text(display(text, multiline=True))
