"""With byte fallback every character can be read and written, and symbols of the user's own are one piece."""

import collections
import dataclasses
import pickle
import random
import unicodedata

import pytest
import regex

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.unreadable import Unreadable
from flax_transformer.experiment import VocabularyConfig

KANNADA = [f"ನಾನು {count} {size} ಮನೆಗಳನ್ನು ನೋಡಿದೆ." for size in ("ದೊಡ್ಡ", "ಸಣ್ಣ", "ಹಳೆಯ") for count in range(40)]
ENGLISH = [f"the {size} house has {count} doors" for size in ("big", "small", "old") for count in range(40)]
CONFIG = VocabularyConfig(size=360)
KINDS = ["bpe", "unigram", "char"]
# What a text may consist of: characters that show something, the marks on them, and what shapes them.
VISIBLE = regex.compile(r"[^\p{Default_Ignorable_Code_Point}\p{C}\p{Z}\u2800\ufff9-\ufffb]")
SHAPING = "\u200c\u200d\ufe0e\ufe0f\U000e0067\U000e007f"
BY_SCRIPT = collections.defaultdict(list)
for character in filter(VISIBLE.match, map(chr, range(0x32400))):  # planes beyond have no visible characters
    # A character's name begins with that of its script.
    BY_SCRIPT[unicodedata.name(character, "OTHER").split(" ")[0].split("-")[0]].append(character)
SCRIPTS = [characters[:: len(characters) // 20 + 1] for characters in BY_SCRIPT.values()]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train(KANNADA + ENGLISH, CONFIG)


def random_text(rng):
    """Words of characters of any script, with joiners inside, and spaces between them."""
    words = []
    for _ in range(rng.randint(1, 4)):
        characters = rng.choices(rng.choice(SCRIPTS), k=rng.randint(1, 4)) + rng.choices(rng.choice(SCRIPTS))
        if rng.random() < 0.3:
            characters.insert(rng.randint(1, len(characters)), rng.choice(SHAPING))
        words.append("".join(characters))
    return " ".join(words)


def test_twenty_thousand_random_strings_come_back(vocabulary):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(20_000)]
    rows = vocabulary.encode(texts)
    assert not any(vocabulary.unk_id in row for row in rows)
    expected = [unicodedata.normalize("NFC", text) for text in texts]
    assert vocabulary.decode(rows) == expected


@pytest.mark.parametrize("model_type", KINDS)
def test_every_script_comes_back(model_type):
    vocabulary = Vocabulary.train(KANNADA + ENGLISH, dataclasses.replace(CONFIG, size=305, model_type=model_type))
    texts = ["".join(characters) for characters in SCRIPTS]
    assert len(texts) > 150
    assert vocabulary.decode(vocabulary.encode(texts)) == [unicodedata.normalize("NFC", text) for text in texts]


@pytest.mark.parametrize(
    "text",
    [
        "👩\u200d👩\u200d👧 ❤\ufe0f 🏴\U000e0067\U000e0062\U000e007f 👍🏽 🇮🇳",
        "ಕ್\u200cಷ ರ್\u200dಕ ಆಂಡ್ರಾಯ್ಡ್\u200cನಲ್ಲಿ",
        "ش\u200cی 日本\U000e0100 x̧̂ Ω ▁ a▁b ▅ <0x41> <s> </s>",
        "▁▁ ▁",
    ],
    ids=["emoji", "Kannada", "others", "mark of a space"],
)
def test_joiners_selectors_and_sentencepiece_s_own_characters_come_back(vocabulary, text):
    (ids,) = vocabulary.encode([text])
    assert vocabulary.decode([ids]) == [unicodedata.normalize("NFC", text)]
    assert pickle.loads(pickle.dumps(vocabulary)).encode([text]) == [ids]


def test_the_same_pieces_in_marian_s_form_read_and_write_the_same(vocabulary):
    marian = MarianVocabulary.of(vocabulary)
    texts = ["the Дом 👩\u200d👩 ಕ್\u200cಷ", "\ufeffthe\tbig\u3000house", "ಕೊಂಡು"]
    assert marian.encode(texts) == vocabulary.encode(texts)
    assert marian.decode(marian.encode(texts)) == vocabulary.decode(vocabulary.encode(texts))
    assert [*map(marian.unknown_characters, texts)] == [*map(vocabulary.unknown_characters, texts)]


def test_what_nobody_sees_is_dropped_and_white_space_is_a_space(vocabulary):
    assert vocabulary.encode(["\ufeffthe\u00adbig\thouse\u3000has\0"]) == vocabulary.encode(["thebig house has"])


def test_a_character_in_bytes_has_no_piece_of_its_own(vocabulary):
    assert vocabulary.unknown_characters("the Дом house 👩\u200d👩") == "Дом👩👩"
    assert Unreadable.of("Дом дом", vocabulary).share == 1.0
    assert Unreadable.of("the big house", vocabulary).share == 0.0


def test_without_byte_fallback_a_vocabulary_has_no_bytes():
    pieces = {
        fallback: Vocabulary.train(ENGLISH, dataclasses.replace(CONFIG, size=size, byte_fallback=fallback)).pieces(
            range(size)
        )
        for fallback, size in ((True, 300), (False, 44))
    }
    assert [piece for piece in pieces[True] if piece.startswith("<0x")] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not [piece for piece in pieces[False] if piece.startswith("<0x")]


def test_a_size_without_room_for_the_bytes_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"size is 100, .* and the 256 bytes need \d+: .*byte_fallback=false"):
        Vocabulary.train(ENGLISH, dataclasses.replace(CONFIG, size=100))


def test_a_character_below_the_coverage_is_spelled_in_bytes(recwarn):
    vocabulary = Vocabulary.train([*ENGLISH, "ß"], dataclasses.replace(CONFIG, size=300, character_coverage=0.999))
    assert "ß" not in vocabulary.pieces(range(vocabulary.size))
    assert vocabulary.decode(vocabulary.encode(["ß"])) == ["ß"] and not recwarn.list


@pytest.mark.parametrize("model_type", KINDS)
def test_a_symbol_is_one_piece_and_is_text_again(model_type):
    symbols = ("<bt>", ">>kan<<", "a,b")
    vocabulary = Vocabulary.train(
        KANNADA + ENGLISH, dataclasses.replace(CONFIG, model_type=model_type, user_symbols=symbols, size=310)
    )
    (tagged,) = vocabulary.encode(["<bt> the big house"])
    assert vocabulary.pieces(tagged)[1] == "<bt>"
    for symbol in symbols:
        text = f"{symbol} the house"
        assert symbol in vocabulary.pieces(vocabulary.encode([text])[0])
        assert vocabulary.decode(vocabulary.encode([text])) == [text]
    assert vocabulary.languages == (">>kan<<",)
    language, rest = vocabulary.split_language(">>kan<< the house")
    assert (language, rest.strip()) == (">>kan<< ", "the house")
    assert vocabulary.encode([language + rest.strip()]) == vocabulary.encode([">>kan<< the house"])
    assert vocabulary.split_language("the house") == ("", "the house")
    accented = Vocabulary.train(
        ENGLISH, dataclasses.replace(CONFIG, user_symbols=(">>é<<",), byte_fallback=False, size=60)
    )
    decomposed = unicodedata.normalize("NFD", ">>é<< the house")
    assert accented.split_language(decomposed) == (">>é<< ", " the house")
    with pytest.raises(ValueError, match="knows no language >>deu<<.*>>kan<<"):
        vocabulary.split_language(">>deu<< the house")


@pytest.mark.parametrize("normalize", [True, False])
def test_a_symbol_is_spelled_as_the_text_is(normalize):
    composed, decomposed = (unicodedata.normalize(form, "<ಕೊ>") for form in ("NFC", "NFD"))
    config = dataclasses.replace(CONFIG, user_symbols=(decomposed, composed), size=310, normalize=normalize)
    vocabulary = Vocabulary.train(KANNADA + ENGLISH, config)
    pieces = vocabulary.pieces(range(vocabulary.size))
    assert composed in pieces and (decomposed in pieces) != normalize
    for symbol in (composed, decomposed):
        found = vocabulary.pieces(vocabulary.encode([f"{symbol} house"])[0])
        assert (composed if normalize else symbol) in found
        assert vocabulary.without_symbols(f"{symbol}house") == "house"


@pytest.mark.parametrize("symbol", ["", "a b", "<s>", "<0x41>", "a▁", "\ufeff"])
def test_a_symbol_that_cannot_be_a_piece_is_refused(symbol):
    with pytest.raises(ValueError, match="vocabulary.user_symbols has"):
        VocabularyConfig(user_symbols=[symbol])


def test_composed_and_decomposed_words_are_the_same_unless_switched_off(vocabulary, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "ಕೊಂಡು ಹೋಯಿತು") for form in ("NFC", "NFD"))
    assert composed != decomposed and vocabulary.encode([composed]) == vocabulary.encode([decomposed])
    text = [composed, decomposed] * 3 + KANNADA + ENGLISH
    as_written = VocabularyPair.train(text, text, dataclasses.replace(CONFIG, normalize=False))
    as_written.save(tmp_path)
    for pair in (as_written, VocabularyPair.load(tmp_path)):
        ids = pair.source.encode([composed, decomposed])
        assert ids[0] != ids[1] and pair.source.decode(ids) == [composed, decomposed]
