"""Tests that files and folders are written as a whole or not at all."""

import pytest
from etils import epath

from flax_transformer.atomic_files import write_file, write_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_one_that_is_there_and_its_folder_is_made(tmp_path):
    path = epath.Path(tmp_path) / "new" / "folder" / "some.json"
    for content in (b"first", b""):
        write_file(path, content)
        assert path.read_bytes() == content and names(path.parent) == ["some.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_file_stays_as_it_was_if_the_new_content_cannot_be_written(tmp_path, monkeypatch, method, error):
    path = epath.Path(tmp_path) / "some.json"
    write_file(path, b"before")
    write_all = type(path).write_bytes

    def fail(draft, _):
        if method == "write_bytes":
            write_all(draft, b"ha")
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(type(path), method, fail)
        write_file(path, b"half")
    assert path.read_bytes() == b"before" and names(tmp_path) == ["some.json"]


def test_a_reader_never_sees_a_part_of_the_new_file(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "some.json"
    write_file(path, b"before")
    write_all, seen = type(path).write_bytes, []

    def write_in_parts(draft, content):
        for end in range(len(content) + 1):
            write_all(draft, content[:end])
            seen.append(path.read_bytes())

    monkeypatch.setattr(type(path), "write_bytes", write_in_parts)
    write_file(path, b"after")
    assert set(seen) == {b"before"} and path.read_bytes() == b"after"


@pytest.mark.parametrize("name", ["model", "ಅ" * 80], ids=["short", "240 bytes"])
def test_a_folder_appears_with_all_its_files_also_in_place_of_an_empty_one(tmp_path, name):
    path = epath.Path(tmp_path) / name
    for exists in (False, True):
        if exists:
            path.mkdir()
        with write_folder(path) as draft:
            (draft / "some").write_bytes(b"content")
            assert list(path.iterdir()) == [] if exists else not path.exists()
        assert names(tmp_path) == [name] and names(path) == ["some"]
        path.rmtree()


def test_a_folder_that_cannot_be_completed_leaves_nothing(tmp_path):
    path = epath.Path(tmp_path) / "model"
    with pytest.raises(KeyboardInterrupt), write_folder(path) as draft:
        (draft / "some").write_bytes(b"content")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
