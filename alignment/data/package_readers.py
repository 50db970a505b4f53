"""What stands in the data files of Python packages, as rows of the toolkit's formats."""

from __future__ import annotations

import html
import io
import json
import re
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.data.formats import Message, Row
from alignment.types import UserInputError

Reader = Callable[[Path], list[Row]]

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_CALCULATION = re.compile(r"<<[^<>]*>>")


def sharegpt_pairs(member: str) -> Reader:
    """Reads `{"conversations": [{"from", "value"}, ...], "chosen": {...}, "rejected": {...}}`."""

    def read(archive: Path) -> list[Row]:
        return [
            {
                "prompt": [_message(turn) for turn in item["conversations"]],
                "chosen": [_message(item["chosen"])],
                "rejected": [_message(item["rejected"])],
            }
            for item in json.loads(_from_tar(archive.read_bytes(), member, archive.name))
        ]

    return read


def labelled_messages(member: str) -> Reader:
    """Reads `{"messages": [{"role", "content"}, ...], "label": bool}`."""

    def read(archive: Path) -> list[Row]:
        items = json.loads(_from_tar(archive.read_bytes(), member, archive.name))
        return [{"messages": item["messages"], "label": item["label"]} for item in items]

    return read


def instructions(member: str) -> Reader:
    """Reads `{"instruction", "input", "output"}`; an input stands below its instruction."""

    def read(archive: Path) -> list[Row]:
        return [
            {
                "prompt": "\n".join(filter(None, (item["instruction"], item["input"]))),
                "completion": item["output"],
            }
            for item in json.loads(_from_tar(archive.read_bytes(), member, archive.name))
        ]

    return read


def rated_snippets(inner: str, member: str) -> Reader:
    """Reads lines of `id, mean rating, text`, separated by tabs, from an archive in the archive.

    Texts are cleaned (`clean`), and each is kept once, whatever its case.
    """

    def read(archive: Path) -> list[Row]:
        packed = _from_tar(archive.read_bytes(), inner, archive.name)
        lines = _from_tar(packed, member, inner).decode("utf-8").splitlines()
        rows: dict[str, Row] = {}
        for line in lines:
            number, rating, text = line.split("\t")
            text = clean(text)
            row = {"text": text, "sentiment": float(rating), "id": int(number)}
            rows.setdefault(text.lower(), row)
        return list(rows.values())

    return read


def clean(text: str) -> str:
    """A snippet of the rated movie reviews as a normal sentence.

    Their file has entities for characters, pairs of single quotes for double ones, and white space
    where dashes were: three or four spaces for a dash between words, which is put back. The spaces
    left of hyphens ("co writer") cannot be told from others, and stay.
    """
    text = html.unescape(text).replace("\u2019", "'").replace("\u2013", "-")
    text = text.replace("''", '"').replace("`", "'").strip()
    text = re.sub(r" {3,}", " - ", text)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<=\() | (?=[,;:!?.)])", "", text)


def symbolic_problems(folder: str) -> Reader:
    """Reads one TOML file a problem: a question, and a solution whose last line is "#### " and
    the number. The solution's `<<...>>` notes for calculators are left out."""

    def read(archive: Path) -> list[Row]:
        with zipfile.ZipFile(archive) as opened:
            names = sorted(name for name in opened.namelist() if _is_in(name, folder))
            if not names:
                raise UserInputError(f"{archive.name} holds no {folder}/*.toml")
            problems = [tomllib.loads(opened.read(name).decode("utf-8")) for name in names]
        return [_problem(problem) for problem in problems if not problem.get("ignore")]

    return read


def _problem(problem: dict[str, Any]) -> Row:
    solution = _CALCULATION.sub("", problem["answer"]).strip()
    answer = solution.rpartition("####")[2].strip()
    return {"question": problem["question"].strip(), "answer": answer, "completion": solution}


def _is_in(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/") and name.endswith(".toml")


def _message(turn: dict[str, str]) -> Message:
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


def _from_tar(packed: bytes, member: str, name: str) -> bytes:
    """One member of a tar archive in memory; nothing is written to disk."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        try:
            stream = archive.extractfile(member)
        except KeyError:
            stream = None
        if stream is None:
            raise UserInputError(f"{name} holds no {member}")
        return stream.read()
