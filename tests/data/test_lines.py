import bz2
import gzip
import lzma

import pytest

from flax_transformer.data.lines import read_lines


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "text").write_bytes(content)
        return str(tmp_path / "text")

    return write


TEXT = "ab c\nd\n" * 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(TEXT.encode(), mtime=0), r"compressed \(gzip\): .*<\(zcat FILE\)"),
        (bz2.compress(TEXT.encode()), r"compressed \(bzip2\): .*bzcat"),
        (bz2.compress(b""), r"compressed \(bzip2\)"),
        (lzma.compress(TEXT.encode()), r"compressed \(xz\): .*xzcat"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), r"compressed \(zstd\): .*zstdcat"),
        (b"PK\x03\x04" + bytes(9), r"a zip archive.*\.docx"),
        (TEXT.encode("utf-16"), r"UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8"),
        (TEXT.encode("utf-32"), r"UTF-32, not UTF-8"),
        (TEXT.encode("utf-16-le"), r"UTF-16LE, not UTF-8"),
        (TEXT.encode("utf-16-be"), r"UTF-16BE, not UTF-8"),
        (TEXT.replace("\n", "\r").encode(), r"carriage returns only: .*tr '\\r' '\\n'"),
        (b"one\rtwo", r"carriage returns only"),
    ],
    ids="gzip bzip2 empty-bzip2 xz zstd zip UTF-16 UTF-32 UTF-16LE UTF-16BE CR one-CR".split(),
)
def test_a_file_that_is_not_utf_8_text_is_an_error_that_says_what_it_is(write, content, message):
    with pytest.raises(ValueError, match=f"text is .*{message}"):
        list(read_lines(write(content)))


@pytest.mark.parametrize("text", ["BZh9 begins bzip2 files", "PK", "one\r", "a\rb\nc", "", "\x00", "7z", "\ufeffಕ"])
def test_text_is_always_accepted(write, text):
    assert list(read_lines(write(text.encode()))) == [
        line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if text
    ]


def test_a_name_that_ends_in_a_space_is_quoted(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read '.*/a ' \(No such file"):
        list(read_lines(f"{tmp_path}/a "))
