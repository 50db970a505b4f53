"""YAML 1.2 to plain data that remembers its lines, and back.

Values follow the core schema of YAML 1.2 (section 10.3.2): `1e-5` is a number, `on` and `off` are
text, `010` is ten. Dates stay text, merge keys and application tags are refused.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from alignment.config.fields import Path
from alignment.types import UserInputError

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")

# How a value begins that is more than a plain scalar.
_STRUCTURED = ("[", "{", '"', "'", "!")

# Unicode line breaks: the emitter must escape them, or the parser reads them back as spaces.
_LINE_BREAKS = frozenset("\x85\u2028\u2029")

_PLAIN_SCALARS: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: float("nan")),
)


@dataclass
class Document:
    """Plain data, the file it came from, and where in it each value stands.

    data:    dicts, lists and scalars.
    source:  the name to use in messages.
    origins: path of a value -> "file:line", or the override that set it.
    """

    data: Any
    source: str
    origins: dict[Path, str] = field(default_factory=dict)

    def origin(self, path: Path) -> str:
        """Where the value at `path`, or else the nearest thing around it, was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.source


def parse_document(text: str, source: str) -> Document:
    """Parse a YAML file whose top is a mapping.

    Raises:
        UserInputError: not YAML, not a mapping, a key given twice; with file and line.
    """
    root = _compose(text, source)
    if root is None:
        raise UserInputError(f"{source}: the file is empty; a recipe is a mapping of sections")
    if not isinstance(root, MappingNode):
        raise UserInputError(
            f"{source}:{root.start_mark.line + 1}: a recipe is a mapping of sections "
            f"(`model: ...`, `data: ...`), not a {_kind(root)}"
        )
    document = Document(None, source)
    document.data = _construct(root, (), document, [])
    return document


def parse_value(text: str, source: str) -> Any:
    """Parse one value, as written on a command line: `1e-5`, `off`, `[a, b]`, `{rank: 8}`.

    What begins with none of `[`, `{`, a quote or `!` is one plain scalar, whatever is in it:
    `Answer: yes` is text.

    Raises:
        UserInputError: not YAML.
    """
    text = text.strip()
    if not text.startswith(_STRUCTURED):
        return _plain_scalar(text)
    try:
        root = _compose(text, "")
    except UserInputError as error:
        raise UserInputError(f"{source}{str(error).removeprefix(':1')}") from error
    assert root is not None
    return _construct(root, (), Document(None, source), [])


def to_yaml(data: Any) -> str:
    """YAML 1.2 text of plain data; `parse_document` gives the same data back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # untyped in ruamel
    yaml.allow_unicode = _LINE_BREAKS.isdisjoint(json.dumps(data, ensure_ascii=False))
    yaml.width = sys.maxsize  # the emitter loses a character where it folds some escaped texts
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _compose(text: str, source: str) -> Node | None:
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserInputError(f"{source}{line}: not valid YAML: {_reason(error)}") from error
    except YAMLError as error:
        raise UserInputError(f"{source}: not valid YAML: {error}") from error
    return node


def _reason(error: MarkedYAMLError) -> str:
    problem = error.problem or error.context or "cannot be parsed"
    if "'\\t'" in problem:
        return "a tab where spaces are needed; YAML is indented with spaces only"
    return problem


def _construct(node: Node, path: Path, document: Document, inside: list[Node]) -> Any:
    line = f"{document.source}:{node.start_mark.line + 1}"
    document.origins.setdefault(path, line)
    if any(node is outer for outer in inside):
        raise UserInputError(f"{line}: an alias refers to what it stands in")
    _refuse_tag(node, line)
    inside = [*inside, node]
    if isinstance(node, MappingNode):
        return _construct_mapping(node, path, document, inside)
    if isinstance(node, SequenceNode):
        return [
            _construct(item, (*path, index), document, inside)
            for index, item in enumerate(node.value)
        ]
    assert isinstance(node, ScalarNode)
    return _scalar(node)


def _construct_mapping(
    node: MappingNode, path: Path, document: Document, inside: list[Node]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _key(key_node, f"{document.source}:{line}")
        if key in result:
            raise UserInputError(
                f"{document.source}:{line}: {'.'.join(map(str, (*path, key)))}: the key is given "
                f"twice, first on line {lines[key]}; keep one"
            )
        lines[key] = line
        document.origins[(*path, key)] = f"{document.source}:{line}"
        result[key] = _construct(value_node, (*path, key), document, inside)
    return result


def _key(node: Node, line: str) -> str:
    if not isinstance(node, ScalarNode):
        raise UserInputError(f"{line}: a key must be a name, not a {_kind(node)}")
    if node.tag == _TAG + "merge":
        raise UserInputError(
            f"{line}: merge keys (<<) are not part of YAML 1.2; write the keys out, or start from "
            "a copy of the recipe"
        )
    return str(node.value)


def _scalar(node: ScalarNode) -> Any:
    text = str(node.value)
    if node.style is not None or node.tag == _TAG + "str":
        return text
    return _plain_scalar(text)


def _plain_scalar(text: str) -> Any:
    for pattern, convert in _PLAIN_SCALARS:
        if pattern.fullmatch(text):
            return convert(text)
    return text


def _refuse_tag(node: Node, line: str) -> None:
    plain = isinstance(node, ScalarNode) and node.tag in [_TAG + tag for tag in _PLAIN_TAGS]
    if not plain and node.tag not in (_TAG + "map", _TAG + "seq"):
        raise UserInputError(f"{line}: the tag {node.tag!r} has no meaning in a recipe; remove it")


def _kind(node: Node) -> str:
    kinds = {MappingNode: "mapping", SequenceNode: "list", ScalarNode: "single value"}
    return kinds[type(node)]
