import dataclasses
import unicodedata

import numpy as np
import pytest

from flax_transformer.data.cleaning import RULES, CleaningRules, first_broken, keys_of, scripts_of
from flax_transformer.data.seen import Seen

GOOD = [
    ("ಎರಡು ಮನೆಗಳು ಇವೆ.", "There are two houses."),
    ("ಅವನು ೨೦೧೪ರಲ್ಲಿ ೧,೦೦,೦೦೦ ರೂಪಾಯಿ ಕೊಟ್ಟ", "In 2014 he gave 100,000 rupees"),
    ("ಮೂರು ಮಕ್ಕಳು", "3 children"),
    ("ಹೌದು", "Yes"),
    ("ಪವಿತ್ರನು, ಪವಿತ್ರನು, ಪವಿತ್ರನು", "Holy, holy, holy"),
    ("ಇಲ್ಲಾಆಆಆ!", "Noooooo!"),
    ("GNOME ಟರ್ಮಿನಲ್ ತೆರೆಯಿರಿ", "Open the GNOME terminal"),
    ("ಆಂಡ್ರಾಯ್ಡ್\u200cನಲ್ಲಿ", "In Android 👍"),
    ("ಬೆಲೆ ೨.೫೦ ರೂಪಾಯಿ", "the price is 2,50 rupees"),
    ("ಎ < ಬಿ ಮತ್ತು ಸಿ > ಡಿ", "a < b and c > d, R&D; I <3 it"),
]
BAD = {
    "unicode": [("ಮನೆ\ufffd", "house"), ("ಮನೆ", "a\udcff"), ("ಮ\0ನೆ", "house"), ("ಮನೆ\ufdd0", "house"), ("ಮನೆ", "a\x85"),
                ("\ufeffಮನೆ", "house")],
    "empty": [("", "house"), ("ಮನೆ", " \u200b"), ("\t", "\ufeff")],
    "markup": [("<b>ಮನೆ</b>", "house"), ("ಮನೆ", "a&nbsp;house"), ("ಮನೆ", 'the <a href="x">house'), ("ಮನೆ", "it&#39;s")],
    "long": [("ಮನೆ " * 300, "house " * 200), ("ಮನೆ", "house " * 200)],
    "ratio": [("ಮನೆ", "this is a house that is very much longer than that"), ("ಇದು ತುಂಬಾ ಉದ್ದವಾದ ಮನೆ. " * 2, "it")],
    "letters": [("ಮನೆ 12345678", "12345678"), ("*** --- ಮ ---", "the house")],
    "script": [("the red house", "the red house is big"), ("ಕೆಂಪು ಮನೆ ದೊಡ್ಡದು", "ಕೆಂಪು ಮನೆ")],
    "equal": [("ಕನ್ನಡ Abcde", "ಕನ್ನಡ  aBCDE "), ("ಮನೆ", "ಮನೆ")],
    "repeats": [("ಮನೆ", "the the the the the"), ("ಮ", "abc" * 5), ("ಅ" * 12, "aah"), ("ಹೋದನು, " * 5, "he went and went"),
                ("ಕ" + "ಾ" * 12, "kaa"), ("ಮ", "ok00000000000ababababab")],
    "numbers": [("೨೦೧೪ರಲ್ಲಿ", "in 2015"), ("ಆಗ", "in 2015"), ("೩ ಮನೆಗಳು", "4 houses"), ("ದೋಷ ೪೦೪", "an error")],
}  # fmt: skip
KANNADA = CleaningRules(source_language="kn", target_language="en")


@pytest.mark.parametrize("name", BAD)
def test_each_rule_drops_what_it_is_for_and_no_good_pair(name):
    for source, target in BAD[name]:
        assert RULES[name](source, target, KANNADA), (source, target)
    for source, target in GOOD:
        assert not RULES[name](source, target, KANNADA), (source, target)


def test_there_is_a_bad_pair_for_each_rule():
    assert BAD.keys() == RULES.keys()


def test_a_pair_counts_for_the_first_rule_that_is_applied():
    assert first_broken("", "2014", KANNADA) == "empty"
    assert first_broken("", "2014", CleaningRules(without=["empty"])) == "letters"
    assert first_broken("", "2014", CleaningRules(without=[*RULES])) == ""
    assert [first_broken(*pair, KANNADA) for pair in GOOD] == [""] * len(GOOD)


@pytest.mark.parametrize(
    ("change", "pair", "rule"),
    [
        ({"max_characters": 4}, ("ಮನೆ", "house"), "long"),
        ({"max_ratio": 1.5}, ("ಮನೆಗಳು", "a house of stone"), "ratio"),
        ({"min_letters": 0.9}, ("ಮನೆ", "house!!"), "letters"),
        ({"min_script": 0.8}, ("GNOM ಮನೆಗಳು", "a house"), "script"),
        ({"max_repeats": 2}, ("ಪವಿತ್ರನು", "holy, holy, holy"), "repeats"),
    ],
)
def test_limits_can_be_set(change, pair, rule):
    assert first_broken(*pair, KANNADA) == ""
    assert first_broken(*pair, dataclasses.replace(KANNADA, **change)) == rule


@pytest.mark.parametrize(
    ("rule", "stays", "dropped"),
    [
        ("numbers", ("ಆಗ", "at 12"), ("ಆಗ", "at 13")),
        ("repeats", ("ಅದು", "the the the the house"), ("ಅದು", "the the the the the house")),
        ("repeats", ("ಅ" * 9, "a"), ("ಅ" * 10, "a")),
        ("ratio", ("a" * 10, "b" * 50), ("a" * 10, "b" * 51)),
        ("long", ("a" * 1000, "b"), ("a" * 1001, "b")),
        ("letters", ("ab---", "b"), ("ab----", "b")),
    ],
)
def test_what_a_limit_names_is_allowed_and_more_is_not(rule, stays, dropped):
    assert not RULES[rule](*stays, KANNADA) and RULES[rule](*dropped, KANNADA)


@pytest.mark.parametrize(
    ("language", "text"),
    [("ar", "كَتَبَ"), ("vi", unicodedata.normalize("NFD", "Tiếng Việt")), ("ja", "コーヒー"), ("kn", "...")],
)
def test_marks_and_signs_that_belong_to_no_script_do_not_count(language, text):
    assert not RULES["script"](text, "", CleaningRules(source_language=language))
    assert RULES["script"](f"{text} {'слово' * 3}", "", CleaningRules(source_language=language))


@pytest.mark.parametrize(
    ("language", "scripts"),
    [
        ("kn", ("Knda",)), ("kan", ("Knda",)), ("kan_Knda", ("Knda",)), ("en", ("Latn",)), ("eng", ("Latn",)),
        ("de-AT", ("Latn",)), ("ja", ("Hani", "Hira", "Kana")), ("ko", ("Hang", "Hani")), ("zh", ("Hani",)),
        ("sr_Latn", ("Latn",)), ("sr", ("Cyrl",)), ("ar", ("Arab",)), ("pa", ("Guru",)), ("pa_PK", ("Arab",)),
        ("sr-ME", ("Latn",)), ("pa-Guru-PK", ("Guru",)),
    ],
)  # fmt: skip
def test_languages_have_their_usual_scripts(language, scripts):
    assert scripts_of(language) == scripts


@pytest.mark.parametrize("language", ["xx", "kn_Xxxx", "qqq"])
def test_a_language_without_a_known_script_is_refused(language):
    with pytest.raises(ValueError, match=f"script of the language '{language}' is not known: name it"):
        CleaningRules(source_language=language)


def test_equal_texts_have_equal_keys():
    keys = keys_of(["a b", " a  b", "a c", "ಕೊ", "ಕ\u0cc6\u0cc2", "\udcff", "", "\ufeffa b"])
    assert keys[0] == keys[1] == keys[7] and keys[3] == keys[4] and len(set(keys.tolist())) == 5


def test_seen_finds_the_first_of_each_and_remembers_all():
    rng = np.random.default_rng(0)
    seen, known = Seen(), set()
    for size in (1, 300, 0, 7, 1000, 50, 3):
        keys = rng.integers(0, 2000, size).astype(np.uint64)
        expected = []
        for key in keys.tolist():
            expected.append(key not in known)
            known.add(key)
        assert seen.add(keys).tolist() == expected
    everything = np.arange(2100, dtype=np.uint64)
    assert seen.has(everything).tolist() == [key in known for key in range(2100)]
