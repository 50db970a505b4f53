"""YAML 1.2 in and out: the core schema by a table written by hand, and round trips."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.config.yaml12 import parse_document, parse_value, to_yaml
from alignment.types import UserInputError

# Text and its value under the core schema of YAML 1.2.2, section 10.3.2.
CORE: list[tuple[str, Any]] = [
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    ("1.5e+3", 1500.0),
    (".5", 0.5),
    ("1.", 1.0),
    ("-0.0", -0.0),
    ("12", 12),
    ("+12", 12),
    ("-3", -3),
    ("010", 10),
    ("0o17", 15),
    ("0x1F", 31),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("1:30", "1:30"),
    ("true", True),
    ("False", False),
    ("TRUE", True),
    ("on", "on"),
    ("off", "off"),
    ("yes", "yes"),
    ("n", "n"),
    ("null", None),
    ("~", None),
    ("", None),
    ("none", "none"),
    (".inf", math.inf),
    ("-.INF", -math.inf),
    ("inf", "inf"),
    ("2020-01-01", "2020-01-01"),
    ("'1e-5'", "1e-5"),
    ('"true"', "true"),
    ("!!str 12", "12"),
    ("1e", "1e"),
    ("[a, 1, {b: off}]", ["a", 1, {"b": "off"}]),
    ("{}", {}),
]


@pytest.mark.parametrize(("text", "value"), CORE)
def test_a_value_is_what_the_core_schema_says(text: str, value: Any) -> None:
    found = parse_value(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_read() -> None:
    assert math.isnan(parse_value(".nan", "x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: the file is empty; a recipe is a mapping of sections"),
        ("# only a comment\n", "f.yaml: the file is empty; a recipe is a mapping of sections"),
        ("- 1\n", "f.yaml:1: a recipe is a mapping of sections"),
        ("just text\n", "f.yaml:1: a recipe is a mapping of sections"),
        ("a: 1\n\tb: 2\n", "f.yaml:2: not valid YAML: a tab where spaces are needed"),
        ("a: [1,\n", "f.yaml:2: not valid YAML"),
        ("a: 1\nb: c: d\n", "f.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: the key is given twice, first on line 1; keep one"),
        ("s:\n  k: 1\n  'k': 1\n", "f.yaml:3: s.k: the key is given twice, first on line 2"),
        ("l:\n- {k: 1, k: 2}\n", "f.yaml:2: l.0.k: the key is given twice"),
        ("a: &x {b: *x}\n", "f.yaml:1: an alias refers to what it stands in"),
        ("a: *gone\n", "f.yaml:1: not valid YAML: found undefined alias 'gone'"),
        ("a: !python/object:os.system x\n", "f.yaml:1: the tag '!python/object:os.system'"),
        ("a: {<<: {b: 1}}\n", "f.yaml:1: merge keys (<<) are not part of YAML 1.2"),
        ("? [a]\n: 1\n", "f.yaml:1: a key must be a name, not a list"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML: but found another document"),
        ("a: \0\n", "f.yaml: not valid YAML"),
    ],
)
def test_a_broken_file_is_explained_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserInputError) as caught:
        parse_document(text, "f.yaml")
    assert str(caught.value).startswith(message)


def test_every_value_knows_its_line() -> None:
    document = parse_document("a:\n  b: 1\n  c:\n  - x\n  - y: 2\nd: 3\n", "f")
    assert document.origin(("a", "b")) == "f:2"
    assert document.origin(("a", "c", 1, "y")) == "f:5"
    assert document.origin(("a", "c", 7)) == "f:3"  # the nearest thing around it
    assert document.origin(("a", "missing")) == "f:1"
    assert document.origin(("d",)) == "f:6"


def test_an_alias_repeats_its_value() -> None:
    assert parse_document("a: &x [1, 2]\nb: *x\n", "f").data == {"a": [1, 2], "b": [1, 2]}


awkward = st.sampled_from(
    [text for text, _ in CORE]
    + ["<<", "=", "a: b", "# no", "- x", "'", '"', "\\", "a\n", "\n", " "]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | awkward
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]))
)
keys = awkward | st.text(max_size=8)
data = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=5), data, min_size=1))
def test_what_is_written_reads_back_unchanged(value: dict[str, Any]) -> None:
    found = parse_document(to_yaml(value), "f").data
    assert found == value
    assert repr(found) == repr(value)  # 1 is not 1.0, and True is not 1
