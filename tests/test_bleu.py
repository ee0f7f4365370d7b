import warnings

import pytest
import sacrebleu
from sacrebleu.metrics import BLEU

import flax_transformer.bleu as bleu
from flax_transformer.bleu import choose_tokenizer, make_bleu, warn_of_missing_spaces
from flax_transformer.experiment import TOKENIZERS
from flax_transformer.training.evaluation import score_translations

TEXTS = {
    "Chinese": "我们明天去北京看朋友。",
    "Chinese with Latin names": "WTO成员国今天在北京开会，讨论 IMF 的报告。",
    "Japanese": "私は明日東京へ行きます。",
    "Thai": "วันนี้อากาศดีมาก",
    "Lao": "ມື້ນີ້ອາກາດດີຫຼາຍ",
    "Khmer": "ថ្ងៃនេះអាកាសធាតុល្អណាស់",
    "Burmese": "ဒီနေ့ရာသီဥတုကောင်းတယ်",
    "Tibetan": "དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག།",
    "Korean": "오늘은 날씨가 아주 좋습니다.",
    "Kannada": "ನಾನು ನಾಳೆ ಬೆಂಗಳೂರಿಗೆ ಹೋಗುತ್ತೇನೆ.",
    "Hindi": "मैं कल दिल्ली जाऊँगा।",
    "Arabic": "سأذهب إلى القاهرة غدا.",
    "Vietnamese": "Ngày mai tôi đi Hà Nội.",
    "Greek": "Αύριο πάω στην Αθήνα.",
    "English that quotes Chinese": "The word 北京 means northern capital.",
    "numbers": "12 34 56,7",
    "nothing": "",
}
WITHOUT_SPACES = ["Chinese", "Chinese with Latin names", "Japanese", "Thai", "Lao", "Khmer", "Burmese", "Tibetan"]


def install(monkeypatch, *installed):
    monkeypatch.setattr(bleu, "_is_installed", lambda tokenize: tokenize in installed)


@pytest.mark.parametrize("language", TEXTS)
def test_the_script_chooses_the_tokeniser(language, monkeypatch):
    install(monkeypatch)
    expected = "zh" if "Chinese" in language and "English" not in language else "char"
    assert choose_tokenizer([TEXTS[language]] * 3) == (expected if language in WITHOUT_SPACES else "13a")


def test_with_mecab_japanese_and_korean_use_the_tokenisers_that_sacrebleu_recommends(monkeypatch):
    install(monkeypatch, "ja-mecab", "ko-mecab")
    chosen = {language: choose_tokenizer([text]) for language, text in TEXTS.items()}
    assert chosen["Japanese"] == "ja-mecab" and chosen["Korean"] == "ko-mecab" and chosen["Chinese"] == "zh"


def test_the_majority_of_references_decides_and_empty_references_are_accepted():
    assert choose_tokenizer([TEXTS["Chinese"]] * 2 + [TEXTS["Greek"]]) == "zh"
    assert choose_tokenizer([TEXTS["Chinese"]] + [TEXTS["Greek"]] * 3) == choose_tokenizer([]) == "13a"


@pytest.mark.parametrize("language", WITHOUT_SPACES)
def test_one_wrong_word_scores_well_in_a_script_without_spaces(language, monkeypatch):
    install(monkeypatch)
    references = [TEXTS[language] + ending for ending in ("1", "2", "3")]
    near, unrelated = [reference[:-2] + reference[-1] for reference in references], [TEXTS["Greek"]] * 3
    scores = [score_translations(made, references, 0.0) for made in (references, near, unrelated)]
    assert scores[0].bleu == pytest.approx(100) and scores[0].bleu > scores[1].bleu > 30 > 5 > scores[2].bleu
    chosen = choose_tokenizer(references)
    assert scores[1].bleu == sacrebleu.corpus_bleu(near, [references], tokenize=chosen).score
    assert f"tok:{chosen}" in scores[1].signature


def test_a_requested_tokeniser_is_used():
    scores = score_translations(["我去北京"], ["我去北京看朋友"], 0.0, tokenize="char")
    assert "tok:char" in scores.signature


def test_the_names_are_sacrebleu_s():
    assert {*TOKENIZERS} == {"auto", *BLEU.TOKENIZERS}


def test_an_unavailable_tokeniser_is_an_error_with_the_setting_and_a_remedy(monkeypatch):
    install(monkeypatch)
    for name, extra in (("ja-mecab", "ja"), ("ko-mecab", "ko")):
        with pytest.raises(
            ValueError, match=rf"^training.evaluation.tokenize is {name}, .* pip install sacrebleu\[{extra}\], or"
        ):
            make_bleu(name, "training.evaluation.tokenize")
    with pytest.raises(ValueError, match="^x is 'words': choose one of none, "):
        make_bleu("words", "x")

    def fail(**options):
        raise OSError("no network")

    monkeypatch.setattr(bleu.BLEU, "__init__", lambda metric, **options: fail())
    with pytest.raises(ValueError, match="^x is flores200, which sacrebleu cannot use here .no network.: "):
        make_bleu("flores200", "x")


def warned(tokenize, references):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_missing_spaces(tokenize, references, "training.evaluation.tokenize")
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("tokenize", ["13a", "intl", "none"])
def test_a_tokeniser_that_needs_spaces_is_a_warning_for_references_without_them(tokenize):
    (line,) = warned(tokenize, [TEXTS["Chinese"]] * 5)
    assert line.startswith(f"training.evaluation.tokenize is {tokenize}, ") and line.endswith("set it to zh")
    (line,) = warned(tokenize, ["ACGTTGCA" * 9, "TTGACA" * 8])  # a script with spaces, but a text without any
    assert line.endswith("set it to char")
    for quiet in (
        [TEXTS["Greek"]] * 5,
        [TEXTS["Korean"]] * 5,
        ["house", "tree"],
        ["Donaudampfschifffahrtselektrizitätenhauptbetriebswerk", *["ein kurzer Satz aus Wörtern"] * 9],
        ["This sentence is as long as sentences are, and it has its spaces."],
        [""],
    ):
        assert warned(tokenize, quiet) == [], quiet
    assert warned("zh", [TEXTS["Chinese"]]) == warned("char", [TEXTS["Thai"]]) == []
