"""Display: text from outside (data, models, servers, libraries) for the terminal, the log and error messages.

A terminal obeys control characters, and characters of text direction change the order of what is read. Everything that
raykd prints passes through `display`.
"""


def display(text: object, *, limit: int | None = None, multiline: bool = False) -> str:
    """Return a text with non-printable characters as escape sequences, such as `\\x1b`.

    Args:
        text: any object; its `str` is shown.
        limit: maximum number of characters; the middle of a longer text is left out.
        multiline: whether line breaks and tabs are kept.
    """
    shown = str(text)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[: limit * 2 // 3]}… ({len(shown):,} characters) …{shown[-limit // 4 :]}"
    kept = "\n\t" if multiline else ""
    return "".join(char if char.isprintable() or char in kept else repr(char)[1:-1] for char in shown)


def summary(error: BaseException | str) -> str:
    """Return the message of a library's exception on one line of at most some 300 characters."""
    name = "" if isinstance(error, str) else type(error).__name__
    return display(" ".join(str(error).split()), limit=300) or name
