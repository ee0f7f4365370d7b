"""Tests that pairs of vocabularies of any kind are saved and loaded without change."""

import re

import pytest

from flax_transformer.data.vocabulary import FILES, VocabularyPair
from flax_transformer.files import OWN_FILES
from tests.data.test_sentencepiece_vocabulary import CONFIG, ENGLISH, KANNADA, SEPARATE


@pytest.fixture(scope="module")
def pair():
    return VocabularyPair.train(KANNADA, ENGLISH, CONFIG)


@pytest.mark.parametrize("config", [CONFIG, SEPARATE])
def test_a_saved_pair_loads_the_same(config, tmp_path):
    pair = VocabularyPair.train(KANNADA, ENGLISH, config)
    pair.save(tmp_path / "new" / "folder")
    loaded = VocabularyPair.load(str(tmp_path / "new" / "folder"))
    assert loaded.joint == pair.joint == config.joint
    assert loaded.source.to_bytes() == pair.source.to_bytes() and loaded.target.to_bytes() == pair.target.to_bytes()
    assert loaded.fingerprint() == pair.fingerprint()


def test_all_files_of_vocabularies_are_known_as_parts_of_a_work_directory():
    assert set(FILES) <= set(OWN_FILES)


def test_saving_again_replaces_all_files(pair, tmp_path):
    separate = VocabularyPair.train(KANNADA, ENGLISH, SEPARATE)
    for saved, names in (
        (pair, ["joint.model"]),
        (separate, ["source.model", "target.model"]),
        (pair, ["joint.model"]),
    ):
        saved.save(tmp_path)
        assert VocabularyPair.load(tmp_path).fingerprint() == saved.fingerprint()
        assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_separate_sides_know_only_their_language():
    separate = VocabularyPair.train(KANNADA, ENGLISH, SEPARATE)
    assert separate.source.size == separate.target.size == SEPARATE.size
    assert separate.target.unk_id in separate.target.encode(KANNADA[:1])[0]
    assert separate.source.unk_id not in separate.source.encode(KANNADA[:1])[0]


def test_fingerprint_tells_vocabularies_apart(pair):
    separate = VocabularyPair.train(KANNADA, ENGLISH, SEPARATE)
    swapped = VocabularyPair(separate.target, separate.source)
    assert len({pair.fingerprint(), separate.fingerprint(), swapped.fingerprint()}) == 3


@pytest.mark.parametrize("present", [[], ["source.model"], ["target.model"]])
def test_a_folder_without_a_vocabulary_is_named(pair, tmp_path, present):
    for name in present:
        (tmp_path / name).write_bytes(pair.source.to_bytes())
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))} holds no vocabulary.*save"):
        VocabularyPair.load(tmp_path)
