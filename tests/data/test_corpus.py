import itertools
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

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
        ("locale_phrases:kn:en:train?pairs", "pairs"),
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


@pytest.fixture(scope="module")
def tfds():
    """TensorFlow Datasets with two small sets of its own: `small_pairs`, and `broken_pairs`, whose download fails."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class SmallPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.Translation(languages=("en", "kn"))
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("kn", "en"))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(23), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for number in range(count):
                yield number, {"kn": f"ಮನೆ {number}\u2028 ", "en": f"house {number}\u2028 "}

    class BrokenPairs(SmallPairs):
        def _split_generators(self, dl_manager):
            raise ConnectionError("the cable is\n cut")

    return tfds


@pytest.fixture(scope="module")
def tfds_folder(tfds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.builder("small_pairs", data_dir=folder).download_and_prepare(file_format="array_record")
    return str(folder)


def test_a_tfds_set_is_read_by_name(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_folder)
    corpus = load_corpus("tfds:small_pairs:train")
    assert sorted(corpus.source) == sorted(f"ಮನೆ {number}\u2028 " for number in range(23))
    assert [text.replace("ಮನೆ", "house") for text in corpus.source] == corpus.target
    other_way = load_corpus("tfds:small_pairs:train?source=en&target=kn")
    assert (other_way.source, other_way.target) == (corpus.target, corpus.source)


def test_a_tfds_split_may_be_sliced_and_a_version_named(tfds_folder):
    everything = load_corpus(f"tfds:small_pairs:1.0.0:train?data_dir={tfds_folder}")
    assert load_corpus(f"tfds:small_pairs:train[:7]?data_dir={tfds_folder}").source == everything.source[:7]
    assert len(load_corpus(f"tfds:small_pairs:test+train[-2:]?data_dir={tfds_folder}")) == 5 + 2


def test_a_tfds_set_is_prepared_on_first_use(tfds, tmp_path):
    spec = f"tfds:small_pairs:test?data_dir={tmp_path}"
    first = load_corpus(spec)
    assert len(first) == 5 and load_corpus(spec) == first
    assert list(tmp_path.rglob("small_pairs-test.array_record*"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:small_pair:train?", "no set 'small_pair': did you mean 'small_pairs'"),
        ("tfds:wmt14_translate/de-ne:train?", "de-ne: there is no such configuration.*wmt14_translate/de-en"),
        ("tfds:small_pairs:9.0.0:train?", "no such configuration or version: write small_pairs, "),
        ("tfds:small_pairs:nope?", "nope.*train.*test"),
        ("tfds:small_pairs:train?source=hi&", "source=hi, target=en: .* en, kn"),
        ("tfds:small_pairs:train?source=en&", "source=en, target=en: "),
    ],
)
def test_a_wrong_tfds_name_suggests_the_nearest(tfds_folder, spec, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(f"{spec}data_dir={tfds_folder}")


def test_a_set_that_cannot_be_downloaded_says_so_at_once(tfds, tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("name not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("it went on"))
    began = time.monotonic()
    with pytest.raises(ValueError, match="name not known.*machine with a network.*TFDS_DATA_DIR") as caught:
        load_corpus(f"tfds:wmt14_translate/de-en:train?data_dir={tmp_path}")
    assert time.monotonic() - began < 30
    message = str(caught.value)
    assert "wmt14_translate/de-en" in message and str(tmp_path) in message and "\n" not in message


def test_a_server_that_answers_with_an_error_counts_as_a_network(tfds, tmp_path, monkeypatch):
    def refuse(request, **options):
        raise urllib.error.HTTPError(request.full_url, 405, "method not allowed", {}, None)

    def prepare(*arguments, **options):
        raise OSError("downloading began")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    with pytest.raises(ValueError, match="downloading began"):
        load_corpus(f"tfds:wmt14_translate/de-en:train?data_dir={tmp_path}")


def test_a_connection_lost_while_preparing_is_an_error_of_one_line(tfds, tmp_path):
    with pytest.raises(ValueError, match="broken_pairs.*the cable is cut.*TFDS_DATA_DIR") as caught:
        load_corpus(f"tfds:broken_pairs:train?data_dir={tmp_path}")
    assert "\n" not in str(caught.value)


def test_a_set_in_a_bucket_says_to_copy_it(tfds, monkeypatch):
    with pytest.raises(ValueError, match="cannot read from a bucket: copy the folder to each machine"):
        load_corpus("tfds:wmt14_translate/de-en:train?data_dir=gs://bucket/tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    with pytest.raises(ValueError, match="gs://bucket/tfds"):
        load_corpus("tfds:wmt14_translate/de-en:train")


def test_a_set_stored_as_tfrecord_is_refused(tfds, tfds_folder, tmp_path):
    kept = next(Path(tfds_folder).rglob("dataset_info.json")).parent
    copy = tmp_path / "small_pairs" / kept.name
    copy.mkdir(parents=True)
    for path in kept.glob("*.json"):
        (copy / path.name).write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="stored as tfrecord, which only TensorFlow reads: .*data_dir=.*array_record"):
        load_corpus(f"tfds:small_pairs:train?data_dir={tmp_path}")
