"""Names to objects: built in, registered, announced; never ambiguous."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment import registry
from alignment.types import UserInputError


class Thing:
    class Inner:
        pass


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in registry.KINDS:
        monkeypatch.setitem(registry._registered, kind, {})


def announce(folder: Path, name: str, points: dict[str, str], *, stale: bool = False) -> None:
    """Describe a package as an installer does, or (stale) as a build leaves it in its folder."""
    info = folder / f"{name}{'.egg-info' if stale else '-1.0.dist-info'}"
    info.mkdir(parents=True)
    (info / ("PKG-INFO" if stale else "METADATA")).write_text(f"Name: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("[alignment.reward]\n" + "\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(str(folder))
    registry._announced.cache_clear()
    registry._entry_points.cache_clear()
    yield folder
    monkeypatch.undo()
    registry._announced.cache_clear()
    registry._entry_points.cache_clear()


def test_a_registered_object_comes_back() -> None:
    assert registry.register("reward", "mine")(Thing) is Thing
    assert registry.get("reward", "mine") is Thing
    assert registry.find("reward", "mine") is None
    assert "mine" in registry.names("reward")
    assert "mine" not in registry.names("source")


def test_registering_the_same_object_again_is_fine() -> None:
    registry.register("reward", "mine")(Thing)
    registry.register("reward", "mine")(Thing)


def test_another_object_under_a_taken_name_is_rejected() -> None:
    registry.register("reward", "mine")(Thing)
    with pytest.raises(UserInputError, match="reward name 'mine' is already taken"):
        registry.register("reward", "mine")(Thing.Inner)


def test_a_built_in_name_cannot_be_registered() -> None:
    with pytest.raises(UserInputError, match="trainer name 'grpo' is already taken"):
        registry.register("trainer", "grpo")(Thing)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserInputError, match=r"unknown trainer 'gpro'; did you mean 'grpo'\?"):
        registry.get("trainer", "gpro")


def test_find_imports_nothing(site: Path) -> None:
    announce(site, "absent", {"ghost": "no_such_module_at_all:Thing"})
    assert registry.find("reward", "ghost") == "no_such_module_at_all:Thing"
    with pytest.raises(UserInputError, match="No module named 'no_such_module_at_all'"):
        registry.get("reward", "ghost")


def test_a_name_two_packages_claim_is_rejected_when_looked_up(site: Path) -> None:
    announce(site, "one", {"same": "one:Thing", "other": "one:Thing"})
    announce(site, "two", {"same": "two:Thing"})
    with pytest.raises(UserInputError, match="'same' is claimed twice, by one:Thing and two:Thing"):
        registry.find("reward", "same")
    assert registry.find("reward", "other") == "one:Thing"


def test_metadata_left_by_a_build_does_not_hide_the_installed_package(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(site, "pack", {"new": "pack:New"})
    source = tmp_path / "source"
    announce(source, "pack", {"old": "pack:Old"}, stale=True)
    monkeypatch.syspath_prepend(str(source))
    assert registry.find("reward", "new") == "pack:New"
    assert "old" not in registry.names("reward")


def test_a_module_may_announce_and_register_the_same_object(site: Path) -> None:
    announce(site, "pack", {"mine": f"{Thing.__module__}:{Thing.__qualname__}"})
    assert registry.register("reward", "mine")(Thing) is Thing
    with pytest.raises(UserInputError, match="already taken"):
        registry.register("reward", "mine")(Thing.Inner)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("alignment.types:Scor", "alignment.types has no 'Scor'; did you mean 'Score'?"),
        ("alignment.types", "not of the form 'module:attribute'"),
        (":Score", "not of the form 'module:attribute'"),
        ("alignment.typos:Score", "No module named 'alignment.typos'"),
        ("alignment.types:Score.valu", "has no 'valu'; did you mean 'value'?"),
    ],
)
def test_a_target_that_cannot_be_had_says_why(target: str, message: str) -> None:
    with pytest.raises(UserInputError) as caught:
        registry.load_target(target, "reward")
    assert message in str(caught.value)


def test_a_target_may_be_an_attribute_of_an_attribute() -> None:
    assert registry.load_target("alignment.types:Outcome.CORRECT", "x").value == "correct"


def test_every_built_in_target_names_a_module_and_an_attribute() -> None:
    for targets in registry._BUILTIN.values():
        for target in targets.values():
            module, colon, attribute = target.partition(":")
            assert module.startswith("alignment.")
            assert colon
            assert attribute.isidentifier()
