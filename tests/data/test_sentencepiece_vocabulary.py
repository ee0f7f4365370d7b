import dataclasses
import pickle
import re
import unicodedata

import numpy as np
import pytest

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig

WORDS = """whenever quiet children walked home along river they kept singing about seven brave travellers who crossed
mountains looking for forgotten gardens while somebody explained yesterday's puzzle beneath another wooden bridge
""".split()
ENGLISH = [
    f"the {first} {second} kept {count} jars / boxes, <why>?"
    for count, (first, second) in enumerate((first, second) for first in WORDS[:12] for second in WORDS[12:])
]
KANNADA = [f"ನಾನು {count} {size} ಮನೆಗಳನ್ನು ನೋಡಿದೆ…" for size in ("ದೊಡ್ಡ", "ಸಣ್ಣ", "ಹಳೆಯ") for count in range(40)]
CONFIG = VocabularyConfig(size=150, byte_fallback=False)
SEPARATE = dataclasses.replace(CONFIG, size=90, joint=False)


@pytest.fixture(scope="module")
def pair():
    return VocabularyPair.train(KANNADA, ENGLISH, CONFIG)


def test_decode_inverts_encode(pair):
    sentences = [*KANNADA, *ENGLISH]
    assert pair.source.decode(pair.source.encode(sentences)) == sentences


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
@pytest.mark.parametrize("text", ["a…b", "１２3", "ರ\u200dಕ ಕ್\u200cಷ", "ﬁne ½", "q\u0323 é", "a\u00a0b"])
def test_text_is_not_normalised_beyond_canonical_composition(text, model_type):
    vocabulary = Vocabulary.train(
        [text] * 3 + ENGLISH, VocabularyConfig(size=80, byte_fallback=False, model_type=model_type)
    )
    assert vocabulary.decode(vocabulary.encode([text])) == [text]


def test_text_that_looks_the_same_has_the_same_ids(pair):
    plain = KANNADA[0]
    others = [
        unicodedata.normalize("NFD", plain),
        plain.replace(" ", "\t"),
        plain.replace(" ", "\u00a0"),
        f"\ufeff{plain}",
        f"{plain}\u200b",
        f"{plain}\r\n",
    ]
    assert pair.source.encode(others) == pair.source.encode([plain]) * len(others)


def test_runs_of_spaces_are_joined(pair):
    assert pair.target.encode(["  the   river "]) == pair.target.encode(["the river"])


def test_a_sentence_ends_with_eos_and_has_no_other_special_id(pair):
    for ids in pair.target.encode([*ENGLISH, ""]):
        assert ids[-1] == pair.target.eos_id
        assert not {pair.target.pad_id, pair.target.bos_id, pair.target.eos_id, pair.target.unk_id} & set(ids[:-1])


def test_no_sentences_give_no_rows(pair):
    assert pair.target.encode([]) == [] and pair.target.decode([]) == []
    assert pair.target.decode([[]]) == [""]


def test_decode_stops_at_the_first_eos_and_skips_padding(pair):
    vocabulary = pair.target
    *first, eos = vocabulary.encode(["the river"])[0]
    *second, _ = vocabulary.encode(["seven jars"])[0]
    row = [vocabulary.pad_id, vocabulary.bos_id, *first, vocabulary.pad_id, eos, *second, eos]
    assert vocabulary.decode([row, row[:-1]]) == ["the river"] * 2
    assert vocabulary.decode(np.array([row, row], np.int32)) == ["the river"] * 2
    assert vocabulary.decode([np.array(second)]) == ["seven jars"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_special_names_in_text_are_ordinary_text(model_type):
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    spoken = [f"a {name} tree{name}" for name in special]
    vocabulary = Vocabulary.train(
        spoken * 5 + ENGLISH, VocabularyConfig(size=80, byte_fallback=False, model_type=model_type)
    )
    assert vocabulary.pieces(range(4)) == ["<pad>", "<s>", "</s>", "<unk>"]
    rows = vocabulary.encode(spoken)
    assert all(min(ids[:-1]) > vocabulary.unk_id for ids in rows)
    assert vocabulary.decode(rows) == spoken


def test_an_unseen_character_becomes_the_unknown_id(pair):
    assert pair.target.unk_id in pair.target.encode(["the ☃ river"])[0]


def test_pieces_spell_the_sentence(pair):
    ids = pair.target.encode(["the river"])[0]
    pieces = pair.target.pieces(np.array(ids))
    assert pieces[-1] == "</s>"
    assert "".join(pieces[:-1]).replace("▁", " ").strip() == "the river"


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_training_twice_gives_the_same_bytes(model_type):
    config = dataclasses.replace(CONFIG, size=80, model_type=model_type)
    assert Vocabulary.train(ENGLISH, config).to_bytes() == Vocabulary.train(tuple(ENGLISH), config).to_bytes()


def test_max_sentences_is_a_seeded_sample():
    few = dataclasses.replace(CONFIG, size=50, max_sentences=20)
    models = [Vocabulary.train(ENGLISH, few).to_bytes() for _ in range(2)]
    other_seed = Vocabulary.train(ENGLISH, dataclasses.replace(few, seed=1)).to_bytes()
    assert models[0] == models[1]
    assert len({models[0], other_seed, Vocabulary.train(ENGLISH[:20], few).to_bytes()}) == 3
    enough = dataclasses.replace(few, max_sentences=len(ENGLISH))
    unlimited = dataclasses.replace(few, max_sentences=10**6)
    assert Vocabulary.train(ENGLISH, enough).to_bytes() == Vocabulary.train(ENGLISH, unlimited).to_bytes()


def test_split_digits_spells_numbers():
    texts = [f"in the year {year}, {event}" for year in range(1980, 2000) for event in ("rain", "snow", "wind")]
    split = Vocabulary.train(texts, VocabularyConfig(size=40, byte_fallback=False, split_digits=True))
    whole = Vocabulary.train(texts, VocabularyConfig(size=40, byte_fallback=False, split_digits=False))
    assert max(sum(map(str.isdigit, piece)) for piece in split.pieces(range(split.size))) == 1
    assert max(sum(map(str.isdigit, piece)) for piece in whole.pieces(range(whole.size))) > 1


def test_a_long_line_is_read_too():
    vocabulary = Vocabulary.train([*ENGLISH, "river " * 5000 + "ß"], CONFIG)
    assert vocabulary.unk_id not in vocabulary.encode(["ß"])[0]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_too_large_a_size_is_an_error_that_names_the_largest(model_type):
    config = VocabularyConfig(size=50_000, byte_fallback=False, model_type=model_type)
    with pytest.raises(ValueError, match=r"vocabulary\.size is 50000.*lower vocabulary\.size") as caught:
        Vocabulary.train(ENGLISH, config)
    largest = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert Vocabulary.train(ENGLISH, dataclasses.replace(config, size=largest)).size == largest
    with pytest.raises(ValueError, match="at most"):
        Vocabulary.train(ENGLISH, dataclasses.replace(config, size=largest + 1))


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_too_small_a_size_is_an_error_that_names_the_smallest(model_type):
    config = VocabularyConfig(size=10, byte_fallback=False, model_type=model_type)
    with pytest.raises(ValueError, match=r"vocabulary\.size is 10.*raise vocabulary\.size") as caught:
        Vocabulary.train(ENGLISH, config)
    smallest = int(re.search(r"need (\d+)", str(caught.value))[1])
    characters = set("".join(ENGLISH)) - {" "}
    assert smallest >= 4 + len(characters)
    with pytest.raises(ValueError, match="need"):
        Vocabulary.train(ENGLISH, dataclasses.replace(config, size=smallest - 1))


def test_a_character_model_may_be_smaller_than_its_limit():
    vocabulary = Vocabulary.train(ENGLISH, VocabularyConfig(model_type="char", byte_fallback=False))
    assert set("".join(ENGLISH)) - {" "} <= set(vocabulary.pieces(range(vocabulary.size)))
    assert vocabulary.size < 100


@pytest.mark.parametrize("sentences", [[], ["", "  "]])
def test_training_without_text_is_refused(sentences):
    with pytest.raises(ValueError, match="sentences are blank"):
        Vocabulary.train(sentences, CONFIG)


def test_bytes_that_are_not_a_model_are_refused():
    for wrong in (b"", b"not a model"):
        with pytest.raises(ValueError, match="SentencePiece model"):
            Vocabulary(wrong)


def test_pickle_keeps_a_joint_pair_joint(pair):
    copy = pickle.loads(pickle.dumps(pair))
    assert copy.joint and copy.fingerprint() == pair.fingerprint()
    assert copy.source.encode(KANNADA) == pair.source.encode(KANNADA)
