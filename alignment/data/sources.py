"""Where rows come from: local files and hub data sets.

A source is a function of keyword options that returns rows, dicts from column to value. Its
signature is its schema: a recipe's `data` section is checked against it. Generated sources are in
`alignment.data.arithmetic` and `alignment.data.procedural`.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from alignment.data.formats import Row
from alignment.types import UserInputError

FileFormat = Literal["auto", "jsonl", "json", "csv", "parquet"]

_FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def file(
    path: str, format: FileFormat = "auto", columns: Mapping[str, str] | None = None
) -> list[Row]:
    """The rows of a local file.

    Args:
        path: relative to the working directory; `~` is the home directory.
        format: jsonl (one object a line), json (a list of objects), csv (with a header line;
            every value is a string) or parquet. `auto` goes by the suffix.
        columns: what to rename, from the file's name to the toolkit's: `{instruction: prompt}`.

    Raises:
        UserInputError: no such file, an empty one, or a malformed row, named by file and line.
    """
    location = existing_file(path)
    kind = _kind(location, format)
    if kind not in _READERS:
        raise UserInputError(
            f"data file {path!r}: the format cannot be told from the suffix "
            f"{location.suffix!r}; set format to one of {', '.join(_READERS)}"
        )
    rows = list(_READERS[kind](location))
    if not rows:
        raise UserInputError(f"data file {path!r} holds no rows; give a file with at least one")
    return rename_columns(rows, columns, str(location))


def existing_file(path: str) -> Path:
    """Where a data file is.

    Raises:
        UserInputError: there is none.
    """
    location = Path(path).expanduser()
    if not location.is_file():
        what = "is a directory" if location.is_dir() else "does not exist"
        raise UserInputError(
            f"data file {path!r} {what} (looked at {location.absolute()}); paths are relative to "
            "the working directory"
        )
    return location


def line_numbers(path: str, format: FileFormat = "auto") -> list[int] | None:
    """The line that each row of a local file begins on, counting from 1; None where rows are not
    lines."""
    location = Path(path).expanduser()
    lines = _LINES.get(_kind(location, format) or "")
    return None if lines is None else [number for number, _ in lines(location)]


def hub(
    id: str,
    split: str,
    config: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """The rows of a hub data set, loaded with the `datasets` package.

    Args:
        id: `org/name`.
        split: such as `train`; slices such as `train[:1000]` work.
        config: the data set's configuration, where it has several.
        revision: branch, tag or commit; name a commit to make runs repeatable.
        columns: what to rename, from the data set's name to the toolkit's.

    Raises:
        UserInputError: it cannot be loaded, with the reason.
    """
    datasets = importlib.import_module("datasets")  # seconds to import, so only where needed
    try:
        dataset = datasets.load_dataset(id, config, split=split, revision=revision)
    except Exception as error:
        raise UserInputError(
            f"data set {id!r} (split {split!r}, config {config!r}) cannot be loaded: "
            f"{type(error).__name__}: {error}\nCheck the id and the split. Without a network, or "
            "with HF_HUB_OFFLINE=1, only data sets already in the local cache can be had: use a "
            "local file (source: file) or a generated source (arithmetic, reasoning_gym)"
        ) from error
    rows: list[Row] = dataset.to_list()
    if not rows:
        raise UserInputError(f"data set {id!r}: split {split!r} holds no rows; choose another")
    return rename_columns(rows, columns, id)


def rename_columns(rows: list[Row], columns: Mapping[str, str] | None, where: str) -> list[Row]:
    """Rows with the columns in `columns` renamed.

    Raises:
        UserInputError: a column that the first row lacks, or two columns that would share a name.
    """
    if not columns:
        return rows
    for old, new in columns.items():
        if old not in rows[0]:
            have = ", ".join(map(repr, rows[0]))
            raise UserInputError(f"{where}: no column {old!r} to rename; it has {have}")
        if new in rows[0] and new not in columns:
            raise UserInputError(f"{where}: {old!r} cannot be renamed to {new!r}, which exists")
    if len(set(columns.values())) < len(columns):
        raise UserInputError(f"{where}: two columns would be renamed to the same name: {columns}")
    return [{columns.get(key, key): value for key, value in row.items()} for row in rows]


def _kind(path: Path, format: FileFormat) -> str | None:
    return _FORMAT_OF_SUFFIX.get(path.suffix.lower()) if format == "auto" else format


def _json_lines(path: Path) -> Iterable[tuple[int, str]]:
    """The lines that hold a row, with their numbers."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def _read_jsonl(path: Path) -> Iterable[Row]:
    for number, line in _json_lines(path):
        yield _object(_json(line, path, number), f"{path}:{number}")


def _read_json(path: Path) -> Iterable[Row]:
    text = _text(path)
    data = _json(text, path, None) if text.strip() else []
    if not isinstance(data, list):
        raise UserInputError(
            f"{path}: holds a {type(data).__name__}; give a list of objects, or one object a line "
            "with format jsonl"
        )
    for number, item in enumerate(data):
        yield _object(item, f"{path}, item {number} (counting from 0)")


def _read_csv(path: Path) -> Iterable[Row]:
    for _, row in _csv_lines(path):
        yield row


def _csv_lines(path: Path) -> Iterable[tuple[int, Row]]:
    """The rows, each with the line that it begins on."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserInputError(f"{path}:1: a column name appears twice in {header}; rename one")
        begins = reader.line_num + 1
        for cells in reader:
            line, begins = begins, reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserInputError(
                    f"{path}:{line}: {len(cells)} values for {len(header)} columns "
                    f"({', '.join(header)}); quote values that hold commas or line breaks"
                )
            yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserInputError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterable[Row]:
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except Exception as error:
        raise UserInputError(f"{path}: not a readable parquet file: {error}") from error
    return rows


_LINES: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
    "jsonl": _json_lines,
    "csv": _csv_lines,
}
_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserInputError(
            f"{path}:{line}: not UTF-8 text ({error}); convert the file"
        ) from error


def _json(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = line if line is not None else error.lineno
        raise UserInputError(
            f"{path}:{shown}: not valid JSON at column {error.colno}: {error.msg}"
        ) from error


def _object(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise UserInputError(f"{where}: a row is an object of columns, not a {type(item).__name__}")
    return item
