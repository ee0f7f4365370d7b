import os
import pickle
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from etils import epath

from flax_transformer.data.cache import ABANDONED_AFTER, cached_arrays

ARRAYS = {
    "tokens": np.arange(10_007, dtype=np.int32),
    "starts": np.array([0, 3, 7], np.int64),
    "none": np.zeros(0, np.int64),
}
KEY, OTHER_KEY = "0123456789abcdef" * 4, "fedcba9876543210" * 4
FILE = "train-0123456789abcdef.npz"

PROGRAM = """
import sys, time
import numpy as np
from etils import epath
from flax_transformer.data.cache import cached_arrays

def build():
    print("building", flush=True)
    sys.stdin.readline()  # until the other process builds too
    return {"tokens": np.arange(10_007, dtype=np.int32)}

arrays = cached_arrays(epath.Path(sys.argv[1]), "train", sys.argv[2], build)
print(arrays["tokens"].sum(), flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    """The folder of the cache, which does not exist yet."""
    return epath.Path(tmp_path) / "work" / "cache"


def never():
    pytest.fail("the arrays were made again")


def check(arrays, expected=ARRAYS):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_arrays_are_made_once_and_then_read(folder):
    check(cached_arrays(folder, "train", KEY, lambda: ARRAYS))
    assert names(folder) == [FILE]
    check(cached_arrays(folder, "train", KEY, never))


def test_another_key_replaces_only_the_file_of_the_same_name(folder):
    others = {"tokens": np.array([5])}
    for name, key in (("train", KEY), ("train-small", KEY), ("valid", OTHER_KEY)):
        check(cached_arrays(folder, name, key, lambda: ARRAYS))
    (folder / "train.npz").write_bytes(b"somebody else's")
    check(cached_arrays(folder, "train", OTHER_KEY, lambda: others), others)
    expected = ["train-fedcba9876543210.npz", f"train-small-{KEY[:16]}.npz", "train.npz", "valid-fedcba9876543210.npz"]
    assert names(folder) == sorted(expected)
    check(cached_arrays(folder, "train", OTHER_KEY, never), others)
    check(cached_arrays(folder, "valid", OTHER_KEY, never))


def test_a_key_that_is_not_a_hash_is_refused(folder):
    for key in ("", "0123", "../../0123456789abcdef", "0123456789ABCDEF"):
        with pytest.raises(AssertionError, match="hexadecimal hash"):
            cached_arrays(folder, "train", key, never)


def test_threads_that_build_at_the_same_time_all_get_the_arrays_and_leave_one_file(folder, monkeypatch, recwarn):
    all_build, all_have_drafts = threading.Barrier(5, timeout=60), threading.Barrier(5, timeout=60)
    replace, results = type(folder).replace, []

    def build():
        all_build.wait()
        return ARRAYS

    def replace_together(draft, target):
        all_have_drafts.wait()
        return replace(draft, target)

    monkeypatch.setattr(type(folder), "replace", replace_together)
    threads = [
        threading.Thread(target=lambda: results.append(cached_arrays(folder, "train", KEY, build))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 5 and not recwarn.list
    for arrays in results:
        check(arrays)
    assert names(folder) == [FILE]
    check(cached_arrays(folder, "train", KEY, never))


def test_processes_that_build_at_the_same_time_both_get_the_arrays_and_leave_one_file(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), KEY],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "building\n"
    outputs = [process.communicate("go on\n", timeout=60)[0] for process in processes]
    assert outputs == [f"{ARRAYS['tokens'].sum()}\n"] * 2
    assert names(folder) == [FILE]
    check(cached_arrays(folder, "train", KEY, never), {"tokens": ARRAYS["tokens"]})


def npz(path, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


DAMAGES = {
    "no bytes": lambda path: path.write_bytes(b""),
    "other bytes": lambda path: path.write_bytes(b"these are no arrays" * 99),
    "a page of zeros": lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[:20_011]),
    "its head alone": lambda path: path.write_bytes(path.read_bytes()[:11]),
    "one bit in the middle": lambda path: path.write_bytes(
        bytes(byte ^ (place == 20_011) for place, byte in enumerate(path.read_bytes()))
    ),
    "one array, no archive": lambda path: (
        np.save(os.fspath(path.parent / "x.npy"), ARRAYS["tokens"]) or (path.parent / "x.npy").replace(path)
    ),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "an archive of pickles": lambda path: npz(path, tokens=np.array([Bomb()], object)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_silently_built_again(folder, damage):
    cached_arrays(folder, "train", KEY, lambda: ARRAYS)
    whole = (folder / FILE).read_bytes()
    DAMAGES[damage](folder / FILE)
    assert (folder / FILE).read_bytes() != whole
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(cached_arrays(folder, "train", KEY, lambda: calls.append(1) or ARRAYS))
        check(cached_arrays(folder, "train", KEY, never))
    assert calls == [1] and names(folder) == [FILE]


def test_a_folder_that_cannot_be_written_is_a_warning_of_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.warns(UserWarning) as caught:
            check(cached_arrays(epath.Path(folder), "train", KEY, lambda: ARRAYS))
        message = str(caught.list[0].message)
        assert len(caught) == 1 and "\n" not in message
        for part in (str(folder / FILE), "File exists" if folder.exists() else "Not a directory", "without it", "make"):
            assert part in message
    assert (tmp_path / "file").read_bytes() == b"in the way"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("the bucket\n is gone")])
def test_a_disk_that_fills_up_during_a_write_is_left_unchanged(folder, monkeypatch, error):
    cached_arrays(folder, "train", OTHER_KEY, lambda: ARRAYS)
    before, write_all = names(folder), type(folder).write_bytes

    def write_half(path, content):
        write_all(path, content[: len(content) // 2])
        raise error

    monkeypatch.setattr(type(folder), "write_bytes", write_half)
    with pytest.warns(UserWarning, match="No space left on device|the bucket is gone") as caught:
        check(cached_arrays(folder, "train", KEY, lambda: ARRAYS))
    assert len(caught) == 1 and "\n" not in str(caught.list[0].message)
    assert names(folder) == before


def test_an_interruption_during_a_write_is_raised_and_leaves_nothing(folder, monkeypatch):
    def interrupt(draft, target):
        assert draft.read_bytes() and not target.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(folder), "replace", interrupt)
        cached_arrays(folder, "train", KEY, lambda: ARRAYS)
    assert names(folder) == []


def test_drafts_of_dead_processes_are_removed_and_others_are_kept(folder):
    folder.mkdir(parents=True)
    ages = {
        f"train-{KEY[:16]}.npz.{'a' * 32}.tmp": ABANDONED_AFTER + 60,
        f"train-{OTHER_KEY[:16]}.npz.{'b' * 32}.tmp": ABANDONED_AFTER + 60,
        f"train-{KEY[:16]}.npz.{'c' * 32}.tmp": 60,
        f"train-{OTHER_KEY[:16]}.npz.{'d' * 32}.tmp": 60,
        f"valid-{KEY[:16]}.npz.{'e' * 32}.tmp": ABANDONED_AFTER + 60,
        "train-notes.tmp": ABANDONED_AFTER + 60,
    }
    for name, age in ages.items():
        (folder / name).write_bytes(b"half a file")
        os.utime(folder / name, (time.time() - age,) * 2)
    cached_arrays(folder, "train", KEY, lambda: ARRAYS)
    assert names(folder) == sorted([FILE, *list(ages)[2:]])
    cached_arrays(folder, "train", KEY, never)


def test_an_error_in_build_is_raised_and_leaves_nothing(folder):
    def build():
        raise ValueError("no pair fits")

    with pytest.raises(ValueError, match="no pair fits"):
        cached_arrays(folder, "train", KEY, build)
    assert not folder.exists()
