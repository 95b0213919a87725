"""YAML with the values that JSON can hold, and with one clear error for what YAML allows but a user hardly means."""

import math
import re
from typing import Any

import yaml

from raykd.errors import UserError

MAX_NODES = 100_000
"""Number of values in a document, with each alias counted as what it stands for. Ten lines of aliases of aliases can
stand for thousands of millions of values."""
_TAG = "tag:yaml.org,2002:"
# YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema). YAML 1.1, which PyYAML implements, reads 1e-4 as a text,
# 010 as 8, 1:30 as 90 and 2025-01-31 as a date.
_INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """A loader that refuses keys that occur twice or are not text, numbers that are not finite, and costly aliases."""

    allows_comments = True

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[int, int] = {}
        """Number of values of each node, by the node's id."""

    def scan_to_next_token(self) -> None:
        start, mark = self.pointer, self.get_mark()
        super().scan_to_next_token()
        if not self.allows_comments and "#" in self.buffer[start : self.pointer]:
            raise yaml.MarkedYAMLError(problem="'#' begins a comment here: quote the value", problem_mark=mark)

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self.sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands for a value that contains it", problem_mark=mark)
        if not is_alias:
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                children = [child for pair in node.value for child in pair]
            self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for child in children)
        if self.sizes[id(node)] > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"there are more than {MAX_NODES:,} values", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key should be a text"
            elif key.tag != f"{_TAG}str":
                problem = f"YAML does not read the key {key.value} as a text: write '{key.value}'"
            elif key.value in known:
                problem = f"the key {key.value!r} occurs twice: remove one"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            known.add(key.value)
        return node

    def integer(self, node: Any) -> int:
        return int(self.construct_scalar(node), 0 if node.value.startswith(("0x", "0o")) else 10)

    def finite_float(self, node: Any) -> float:
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is not a finite number", problem_mark=node.start_mark)
        return value

    def text(self, node: Any) -> str:
        value = self.construct_scalar(node)
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            problem = "the text has a NUL character or half of a surrogate pair"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(f"(?:{_INTEGER.pattern})$"), list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
_Loader.yaml_constructors = {
    f"{_TAG}null": _Loader.construct_yaml_null,
    f"{_TAG}bool": _Loader.construct_yaml_bool,
    f"{_TAG}int": _Loader.integer,
    f"{_TAG}float": _Loader.finite_float,
    f"{_TAG}str": _Loader.text,
    f"{_TAG}seq": _Loader.construct_yaml_seq,
    f"{_TAG}map": _Loader.construct_yaml_map,
    # All other tags, such as !!set and !!binary.
    None: _Loader.construct_undefined,
}


class _ValueLoader(_Loader):
    """A loader for a value on the command line, where a comment is a mistake."""

    allows_comments = False


def parse_yaml(text: str, *, allow_comments: bool = True) -> Any:
    """Return the parsed YAML of a text.

    Args:
        text: one YAML document.
        allow_comments: whether `#` may begin a comment.

    Raises:
        UserError: if the text is not valid YAML, with the line and the column. PyYAML raises various exceptions, such
            as a ValueError for a number with too many digits.
    """
    try:
        return (_Loader if allow_comments else _ValueLoader)(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{place}{' '.join(problem.split())}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"line {line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        ) from None
    except RecursionError:
        raise UserError("the YAML is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from None
