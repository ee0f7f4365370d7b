import itertools
import re

import pytest

from flax_transformer.data.corpus import FINGERPRINT_CHUNK, ParallelText, corpus_files, load_corpus
from flax_transformer.data.locale_phrases import locale_phrases


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file and returns its path as a string."""

    def write_file(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file


def test_files_pair_line_by_line(write):
    source, target = write("a.kn", "ಒಂದು\nಎರಡು\n"), write("a.en", "one\ntwo\n")
    corpus = load_corpus(f"files:{source},{target}")
    assert corpus == ParallelText(["ಒಂದು", "ಎರಡು"], ["one", "two"], [1, 1])
    assert len(corpus) == 2


@pytest.mark.parametrize(
    "strange", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\ufeff"]
)
def test_only_a_line_feed_ends_a_line(write, strange):
    source = [f"a{strange}b", "c"]
    assert len("\n".join(source).splitlines()) > 2 or strange == "\ufeff"
    paths = write("a", "\n".join(source)), write("b", "x\ny")
    corpus = load_corpus(f"files:{paths[0]},{paths[1]}")
    assert (corpus.source, corpus.target) == (source, ["x", "y"])


@pytest.mark.parametrize("content", ["one\ntwo", "one\ntwo\n", "one\r\ntwo\r\n", "\ufeffone\ntwo\n", "one\r\ntwo"])
def test_line_ends_and_a_byte_order_mark_make_no_difference(write, content):
    source, target = write("a", content), write("b", "x\ny")
    assert load_corpus(f"files:{source},{target}").source == ["one", "two"]


def test_text_is_kept_as_written(write):
    lines = ["  two  spaces ", "", "…１２ ರ\u200dಕ", "\ttab\t", "<s> & \u00a0"]
    source, target = write("a", "\n".join(lines)), write("b", "\n" * len(lines))
    assert load_corpus(f"files:{source},{target}").source == lines


def test_tsv_reads_the_first_two_columns(write):
    path = write("pairs.tsv", "one\tಒಂದು\ttatoeba\t7\ntwo \tಎರಡು\r\n\tempty\n")
    corpus = load_corpus(f"tsv:{path}")
    assert (corpus.source, corpus.target) == (["one", "two ", ""], ["ಒಂದು", "ಎರಡು", "empty"])


def test_sources_are_joined_and_weighted(write):
    first, second = write("a.tsv", "a\tA\nb\tB\n"), write("b.tsv", "c\tC\n")
    corpus = load_corpus(f"tsv:{first} + 3*tsv:{second}")
    assert corpus == ParallelText(["a", "b", "c"], ["A", "B", "C"], [1, 1, 3])


@pytest.mark.parametrize("name", ["a, b", "a + b", " a ", 'say "a"', "a,b + 2*tsv:c", "~", "[a]*?", "a\nb"])
def test_a_path_in_quotes_may_contain_any_character(write, name):
    quoted = '"{}"'.format(write(name, "one\ttwo\n").replace('"', '""'))
    assert load_corpus(f"tsv:{quoted} + 2*files:{quoted}, {write('other', 'three')}") == ParallelText(
        ["one", "one\ttwo"], ["two", "three"], [1, 2]
    )
    assert len(corpus_files(f"2*files:{quoted},x + tsv:{quoted}")) == 3


def test_spaces_around_a_path_are_ignored_and_a_tilde_is_the_home_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a", "1\n")
    write("b", "2\n")
    assert load_corpus("files:~/a , ~/b") == ParallelText(["1"], ["2"], [1])
    assert corpus_files("files:a, b + tfds:x:train") == ["a", "b"]


def test_a_file_on_both_sides_is_a_warning(write):
    path = write("a", "1\n")
    with pytest.warns(UserWarning, match="the same file as source and as target"):
        load_corpus(f"files:{path},{path}")


def test_locale_phrases_are_called_with_the_options():
    corpus = load_corpus("2*locale_phrases:kn:en:valid?pairs=11&parts=1&seed=3")
    assert (corpus.source, corpus.target) == locale_phrases("kn", "en", "valid", pairs=11, parts=1, seed=3)
    assert corpus.repeats == [2] * 11


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("file:a,b", "did you mean 'files'.*tsv, tfds, locale_phrases"),
        ("a.kn,a.en", "choose one of files, tsv, tfds, locale_phrases"),
        ("", "choose one of"),
        ("files:a", "names 1 file: write files:SOURCE,TARGET"),
        ("files:a,b,c", "names 3 files.*a comma in double quotes"),
        ("files:none, b", r"cannot read none \(No such"),
        ("files:/dev/stdin,-", "standard input can be only one of them"),
        ("0*files:a,b", "weight 0"),
        ("locale_phrases:kn:en:train?pair=5", "did you mean 'pairs'.*parts, seed"),
        ("locale_phrases:kn:en:train?pairs", "option 'pairs' is not known"),
        ("locale_phrases:kn:en:train?pairs=many", "pairs is 'many'"),
        ("locale_phrases:kn:en:train", r"pairs=NUMBER"),
        ("locale_phrases:kn:en?pairs=5", "SOURCE:TARGET:SPLIT"),
        ("tfds:wmt14_translate", "tfds:NAME:SPLIT"),
        ("tfds:wmt14_translate:train?src=en", "did you mean 'source'|choose one of source, target"),
    ],
)
def test_a_wrong_name_says_how_to_write_it(spec, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(spec)


def test_unequal_files_name_both_counts(write):
    first, second = write("a.kn", "1\n2\n3\n"), write("a.en", "1\n2\n")
    with pytest.raises(ValueError, match=f"{re.escape(first)} has 3 lines, {re.escape(second)} has 2"):
        load_corpus(f"files:{first},{second}")


def test_invalid_utf8_names_line_and_byte(write):
    path = write("a.tsv", b"fine\tfine\n" + "ಕ".encode() + b"x\xff\ty\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: byte 5 of the line, 0xff")):
        load_corpus(f"tsv:{path}")


def test_a_row_with_one_column_names_its_line(write):
    path = write("a.tsv", "a\tb\nno tab\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: there is no tab")):
        load_corpus(f"tsv:{path}")


def test_an_empty_source_is_named_even_beside_a_full_one(write):
    full, empty = write("full.tsv", "a\tb\n"), write("empty.tsv", "")
    with pytest.raises(ValueError, match=f"'tsv:{re.escape(empty)}' has no sentence pairs"):
        load_corpus(f"tsv:{full} + tsv:{empty}")


def test_a_missing_file_is_named(tmp_path):
    for missing in (tmp_path / "nothing.tsv", tmp_path):
        with pytest.raises(ValueError, match=f"cannot read {re.escape(str(missing))} .*: check the path"):
            load_corpus(f"tsv:{missing}")


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="source, target and repeats have .* entries"):
        ParallelText(["a"], ["b", "c"], [1])


def test_fingerprints_differ_if_any_word_or_line_break_moves():
    moved = [
        (["one two", "three"], ["x", "y z"], [1, 1]),
        (["one", "two three"], ["x", "y z"], [1, 1]),
        (["one", " twothree"], ["x", "y z"], [1, 1]),
        (["one two three", ""], ["x", "y z"], [1, 1]),
        (["one two\nthree", ""], ["x", "y z"], [1, 1]),
        (["one two\n", "three"], ["x", "y z"], [1, 1]),
        (["one two", "\nthree"], ["x", "y z"], [1, 1]),
        (["one two", "threex"], ["", "y z"], [1, 1]),
        (["one two", "three"], ["xy", " z"], [1, 1]),
        (["three", "one two"], ["x", "y z"], [1, 1]),
        (["x", "y z"], ["one two", "three"], [1, 1]),
        (["one two", "three"], ["x", "y z"], [1, 2]),
        (["one two", "three"], ["x", "y z"], [2, 1]),
        (["one two", "three", ""], ["x", "y z", ""], [1, 1, 1]),
        (["one two"], ["x"], [1]),
        ([], [], []),
    ]
    prints = [ParallelText(*lists).fingerprint() for lists in moved]
    for (text, one), (other, two) in itertools.combinations(zip(moved, prints, strict=True), 2):
        assert one != two, (text, other)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in prints)
    assert prints == [ParallelText(*lists).fingerprint() for lists in moved]


def test_fingerprints_cover_every_character_of_a_long_text_even_invalid_ones():
    count = 2 * FINGERPRINT_CHUNK + 7
    prints = set()
    for place in (0, FINGERPRINT_CHUNK - 1, FINGERPRINT_CHUNK, count - 1, None):
        for character in ("ಕ", "\ud800", "\udc00"):
            target = ["word"] * count
            if place is not None:
                target[place] = f"wor{character}"
            prints.add(ParallelText(["word"] * count, target, [1] * count).fingerprint())
    assert len(prints) == 4 * 3 + 1
