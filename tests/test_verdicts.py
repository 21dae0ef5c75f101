"""The verdict cache: what is in a key, and that nothing on disk can fail a caller."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dyncc import verdicts
from dyncc.options import Layers

VERDICT = {"applied": True, "speedup": 1.25}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path / "cache"))
    verdicts._warn_once.cache_clear()
    return tmp_path / "cache"


def test_put_get_entries_clear(cache: Path) -> None:
    first, second = verdicts.key("graph", ["source"], "a"), verdicts.key("graph", ["source"], "b")
    assert verdicts.get(first) is None
    assert verdicts.put(first, VERDICT)
    assert verdicts.put(second, {"applied": False})
    assert verdicts.get(first) == VERDICT
    assert verdicts.entries() == {first: VERDICT, second: {"applied": False}}
    assert verdicts.size() == sum(path.stat().st_size for path in cache.iterdir()) > 0
    (cache / "notes.json").write_text("{}")
    assert verdicts.clear() == 2
    assert [path.name for path in cache.iterdir()] == ["notes.json"]


def test_an_absent_cache_is_empty(cache: Path) -> None:
    assert verdicts.entries() == {}
    assert verdicts.size() == verdicts.clear() == 0
    assert not cache.exists()


def test_the_key_holds_everything_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> str:
        return verdicts.key("graph", ["one", "two"], "text")

    first = name()
    assert first == name()
    assert len({first, verdicts.key("other", ["one", "two"], "text"), verdicts.key("graph", ["onetwo"], "text")}) == 3
    assert verdicts.key("graph", ["one", "two"], "other") != first
    for target, value in (("cpu_model", lambda: "another CPU"), ("version", lambda package: "0")):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, target, value)
            assert name() != first


def test_sources_are_the_files_of_the_passes() -> None:
    (text,) = verdicts.sources([Layers("3")])
    assert "class Layers" in text


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"key": "other", "verdict": {}}', "\x00\xff"])
def test_a_damaged_entry_is_absent_and_rebuilt(cache: Path, damage: str) -> None:
    name = verdicts.key("graph", [], "")
    verdicts.put(name, VERDICT)
    (cache / f"{name}.json").write_text(damage, encoding="latin-1")
    assert verdicts.get(name) is None
    assert verdicts.entries() == {}
    assert verdicts.put(name, VERDICT)
    assert verdicts.get(name) == VERDICT


def test_an_entry_copied_under_another_name_is_not_believed(cache: Path) -> None:
    first, second = verdicts.key("a", [], ""), verdicts.key("b", [], "")
    verdicts.put(first, VERDICT)
    (cache / f"{first}.json").rename(cache / f"{second}.json")
    assert verdicts.get(second) is None


def test_a_folder_that_cannot_be_written_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DYNCC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    name = verdicts.key("graph", [], "")
    with pytest.warns(UserWarning, match=r"cannot keep verdicts in .*set DYNCC_CACHE_DIR to another folder"):
        assert not verdicts.put(name, VERDICT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not verdicts.put(name, VERDICT)
        assert verdicts.get(name) is None
        assert verdicts.entries() == {}


def test_nothing_is_left_when_the_rename_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verdicts.os, "replace", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert not verdicts.put(verdicts.key("graph", [], ""), VERDICT)
    assert list(cache.iterdir()) == []


def test_the_default_place_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNCC_CACHE_DIR")
    monkeypatch.setattr(verdicts.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "dyncc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert verdicts.folder() == Path.home() / ".cache" / "dyncc"
