import json
import pickle

import pytest

from flax_transformer.data.fairseq_vocabulary import DESCRIPTION, PIECES_MODEL
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import VocabularyConfig
from tests.languages import language_pair

LINES = ["the dog sees the cat", "a cat runs", "ಬೆಕ್ಕು ಓಡುತ್ತದೆ", "</s> a dog"] * 3


@pytest.fixture(scope="module")
def trained():
    return VocabularyPair.train(LINES, LINES, VocabularyConfig(size=60, byte_fallback=False)).source


@pytest.fixture(scope="module")
def pair(trained):
    return language_pair(trained)


def test_a_text_begins_with_its_own_language_or_else_with_the_one_that_was_chosen(pair):
    source = pair.source.speaking("kan_Knda")
    kannada, english = (source.pieces([row[0]]) for row in source.encode(["a cat", "eng_Latn a cat"]))
    assert (kannada, english) == (["kan_Knda"], ["eng_Latn"])
    (row,), (other,) = source.encode(["a cat"]), source.encode(["eng_Latn   a cat"])
    assert row[1:] == other[1:] and row[-1] == source.eos_id
    assert source.decode([row, other]) == ["a cat"] * 2
    assert pair.source.encode(["fra_Latn"]) == [[pair.source.encode(["fra_Latn a"])[0][0], source.eos_id]]
    with pytest.raises(ValueError, match='the language of the text "a cat": give source_language and target_language'):
        pair.source.encode(["a cat"])


def test_special_strings_within_a_text_are_text(pair):
    source = pair.source.speaking("eng_Latn")
    rows = source.encode(["a </s> dog", "the fra_Latn dog"])
    assert all(row.count(source.eos_id) == 1 and len(source.language_ids & {*row}) == 1 for row in rows)
    assert source.decode(rows)[0] == "a </s> dog"


def test_pieces_without_text_are_left_out_when_ids_are_decoded(pair):
    target = pair.target.speaking("eng_Latn")
    (row,) = target.encode(["the cat"])
    ids = {piece: number for number, piece in enumerate(target.pieces(range(target.size)))}
    extra = [ids["<mask>"], max(ids.values()), ids["fra_Latn"], ids["<pad>"]]
    assert target.decode([row[:2] + extra + row[2:]]) == ["the cat"]


@pytest.mark.parametrize(
    ("language", "match"),
    [
        ("kan_Deva", "knows no language kan_Deva: did you mean kan_Knda"),
        ("eng", "did you mean eng_Latn"),
        ("xx", "give one of eng_Latn, fra_Latn, kan_Knda"),
    ],
)
def test_an_unknown_language_is_an_error_that_lists_near_ones(pair, language, match):
    with pytest.raises(ValueError, match=match) as raised:
        pair.speaking(language, "")
    assert "\n" not in str(raised.value) and "It knows 4 languages" in str(raised.value)


def test_an_unknown_language_at_the_beginning_of_a_text_is_an_error(pair):
    with pytest.raises(ValueError, match="no language kat_Latn: did you mean kat_Geor"):
        pair.source.encode(["kat_Latn a cat"])


def test_m2m100_s_languages_have_short_names(trained):
    target = language_pair(trained, "M2M100Tokenizer").target
    assert target.speaking("kn").language == target.speaking("__kn__").language == "__kn__"
    assert target.encode(["__kn__ a cat"]) == target.speaking("kn").encode(["a cat"])
    with pytest.raises(ValueError, match="no language kx: did you mean kn"):
        target.speaking("kx")
    assert len(target.speaking("en").encode(["__init__ is no language"])[0]) > 5


def test_other_vocabularies_know_no_languages_by_code(trained):
    assert trained.speaking("") is trained
    with pytest.raises(ValueError, match="does not know languages by code: leave it out"):
        trained.speaking("kan_Knda")


def test_a_pair_is_stored_and_loaded_with_its_languages(pair, tmp_path):
    spoken = pair.speaking("kan_Knda", "eng_Latn")
    spoken.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PIECES_MODEL, DESCRIPTION])
    found = VocabularyPair.load(tmp_path)
    assert (found.source.language, found.target.language) == ("kan_Knda", "eng_Latn")
    for first, second in ((found, spoken), (pickle.loads(pickle.dumps(spoken)), spoken)):
        assert first.fingerprint() == second.fingerprint() != pair.fingerprint()
        assert first.source.encode(LINES) == spoken.source.encode(LINES)
        assert first.target.encode(LINES) == spoken.target.encode(LINES) != spoken.source.encode(LINES)
    pair.save(tmp_path)
    assert VocabularyPair.load(tmp_path).target.language == ""


def test_sources_may_end_with_their_language_and_targets_never_do(trained, tmp_path):
    pair = language_pair(trained, language_last=True).speaking("kan_Knda", "kan_Knda")
    pair.save(tmp_path)
    for each in (pair, VocabularyPair.load(tmp_path)):
        (source,), (target,) = each.source.encode(["a cat"]), each.target.encode(["a cat"])
        assert source == [*target[1:], target[0]]
        assert each.source.decode([source]) == each.target.decode([target]) == ["a cat"]


@pytest.mark.parametrize(("unused", "growth"), [(2, 0), (0, 1)])
def test_a_new_language_takes_the_first_id_that_nothing_uses(trained, unused, growth):
    before = language_pair(trained, unused=unused)
    after = before.speaking("tcy_Knda", "eng_Latn", add=True)
    assert after.source.size == after.target.size == before.source.size + growth
    (row,) = after.source.encode(["a cat"])
    assert row[1:] == before.source.speaking("eng_Latn").encode(["a cat"])[0][1:]
    assert row[0] == before.source.size - unused
    for name in ("Tulu", "tcy_knda", "<s>"):
        with pytest.raises(ValueError, match="give it a name such as kan_Knda"):
            before.speaking(name, "", add=True)


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": "abc"},
        {"pieces": ["a", "a"]},
        {"pieces": [1, 2]},
        {"pieces": {}},
        {"languages": []},
        {"languages": ["deu_Latn"]},
        {"languages": ["<s>"]},
        {"tokenizer": "Other"},
        {"tokenizer": ["NllbTokenizer"]},
        {"source_language": "deu_Latn"},
        {"source_language": 7},
    ],
)
def test_a_damaged_description_is_an_error_of_one_line(pair, tmp_path, change):
    pair.save(tmp_path)
    file = tmp_path / DESCRIPTION
    fields = json.loads(file.read_text()) | change
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=DESCRIPTION) as raised:
        VocabularyPair.load(tmp_path)
    assert "\n" not in str(raised.value)
    for content in (b"", b"[" * 100_000, b"[]", b"\xff", b"{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=DESCRIPTION):
            VocabularyPair.load(tmp_path)
