import importlib.util
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flax_transformer.data.corpus import load_corpus


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

    class PackedPairs(SmallPairs):
        def _split_generators(self, dl_manager):
            folder = Path(dl_manager.download_dir)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.make_archive(str(folder / "pairs"), "gztar", Path(__file__).parent, Path(__file__).name)
            dl_manager.extract(folder / "pairs.tar.gz")
            return super()._split_generators(dl_manager)

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


def test_a_set_that_comes_in_an_archive_says_that_tensorflow_unpacks_it(tfds, tmp_path):
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    with pytest.raises(ValueError, match="No module named 'tensorflow'.*: run pip install tensorflow, which only prep"):
        load_corpus(f"tfds:packed_pairs:train?data_dir={tmp_path}")


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
