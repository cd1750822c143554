"""The doors: a room that is there offers what its protocol says; one that is not is None."""

import inspect

import pytest

import nanovllm
from nanovllm.layers.attention import AttentionBackend
from nanovllm.utils.rooms import find_room


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_what_a_room_offers(name):
    if (room := find_room(name)) is None:
        pytest.skip(f"nanovllm/{name} is not there")
    assert room.__name__ == f"nanovllm.{name}" and find_room(name) is room
    assert room.BACKENDS and all(issubclass(b, AttentionBackend) for b in room.BACKENDS)
    assert len({backend.name for backend in room.BACKENDS}) == len(room.BACKENDS)
    assert list(inspect.signature(room.optimize).parameters)[:2] == ["model", "group"]
    assert hasattr(room, "Lookahead") == (name == "gpu")


def test_what_is_not_there_is_none():
    assert find_room("kitchen") is None


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that belongs to the package for the length of a test."""
    monkeypatch.setattr(nanovllm, "__path__", [*nanovllm.__path__, str(tmp_path)])
    return tmp_path


def test_an_empty_folder_is_no_room(elsewhere):
    """Such as one of which a cache has remained."""
    (elsewhere / "pantry" / "__pycache__").mkdir(parents=True)
    assert find_room("pantry") is None


def test_a_broken_room_says_so(elsewhere):
    """It is there, so its error is not hidden."""
    (elsewhere / "cellar").mkdir()
    (elsewhere / "cellar" / "__init__.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        find_room("cellar")
