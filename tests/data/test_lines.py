import bz2
import gzip
import io
import lzma
import sys
import tarfile
import types

import pytest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from flax_transformer.data.lines import read_lines


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "text").write_bytes(content)
        return str(tmp_path / "text")

    return write


TEXT = "ab c\nd\n" * 50


def tar_archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("name"), io.BytesIO())
    return file.getvalue()


TAR = tar_archive()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], r"compressed \(gzip\) and damaged .*copy it again"),
        (bz2.compress(TEXT.encode())[:-9], r"compressed \(bzip2\) and damaged"),
        (lzma.compress(TEXT.encode())[:-9], r"compressed \(xz\) and damaged"),
        (zstd.compress(TEXT.encode())[:-9], r"compressed \(zstd\) and damaged"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 9, r"compressed \(zstd\) and damaged"),
        (b"\x04\x22\x4d\x18" + bytes(9), r"compressed \(lz4\): unpack it first, or name <\(lz4cat FILE\)"),
        (b"PK\x03\x04" + bytes(9), r"a zip archive.*\.docx"),
        (gzip.compress(TAR), r"a tar archive: unpack it with tar -xf"),
        (TEXT.encode("utf-16"), r"UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8"),
        (TEXT.encode("utf-32"), r"UTF-32, not UTF-8"),
        (TEXT.encode("utf-16-le"), r"UTF-16LE, not UTF-8"),
        (TEXT.encode("utf-16-be"), r"UTF-16BE, not UTF-8"),
        (TEXT.replace("\n", "\r").encode(), r"carriage returns only: .*tr '\\r' '\\n'"),
        (b"one\rtwo", r"carriage returns only"),
    ],
    ids="gzip bzip2 xz zstd zstd-begun lz4 zip tar.gz UTF-16 UTF-32 UTF-16LE UTF-16BE CR one-CR".split(),
)
def test_a_file_that_is_not_utf_8_text_is_an_error_that_says_what_it_is(write, content, message):
    with pytest.raises(ValueError, match=f"text is .*{message}"):
        list(read_lines(write(content)))


PACK = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
    "zstd after a frame to skip": lambda text: b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstd.compress(text),
}


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
def test_a_compressed_file_is_read_as_its_text_even_in_several_parts(write, pack, monkeypatch):
    half = TEXT[: len(TEXT) // 2].encode(), TEXT[len(TEXT) // 2 :].encode()
    for content in (pack(TEXT.encode()), pack(half[0]) + pack(half[1])):
        path = write(content)
        assert list(read_lines(path)) == TEXT.splitlines()
        with open(path, "rb") as file:
            monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=file))
            assert list(read_lines("-")) == TEXT.splitlines()
    assert list(read_lines(write(pack(b"")))) == []


def test_bytes_that_are_not_utf_8_can_be_kept_as_lone_surrogates(write):
    assert list(read_lines(write(b"a\xffb\nc"), errors="surrogateescape")) == ["a\udcffb", "c"]


@pytest.mark.parametrize("text", ["BZh9 begins bzip2 files", "PK", "one\r", "a\rb\nc", "", "\x00", "7z", "\ufeffಕ"])
def test_text_is_always_accepted(write, text):
    assert list(read_lines(write(text.encode()))) == [
        line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if text
    ]


def test_a_name_that_ends_in_a_space_is_quoted(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read '.*/a ' \(No such file"):
        list(read_lines(f"{tmp_path}/a "))
