import time

import pytest

from flax_transformer.text.sentences import cut_sentences, sentence_ends
from tests.text.hostile import plain_text


@pytest.mark.parametrize(
    "sentences",
    [
        ["He ran.", " She sat!", " Why?", " Nobody knows…", " So it goes"],
        ["Mr. and Mrs. J. R. Hall met Prof. Dr. Ott.", " They spoke."],
        ["It costs 3.50 euros.", " See Fig. 3 and no. 12.", " No.", " I will not."],
        ["The U.S. Senate met.", " So am I.", " Then e.g. this, i.e. that."],
        ['"Stop!" she said.', ' "Go."', " (He went.)", " [Yes.]", " Then 'so.'", " End."],
        ["Am 3. Oktober kam er, z. B. im 2. Stock.", " Er ist 30.", " Sie lacht."],
        ["« Où ? » dit-il.", " « Ici. »", " Bien."],
        ["你好。", "怎么样？！", "“好！”", "他走了。", "是吗?", "是的"],
        ["「はい。」と言った。", "雨です！"],
        ["ಡಾ. ಕೆ. ರಾಮಯ್ಯ ಬಂದರು.", " ಅದು ಇದೆ.", " ಹೌದು।", "ಸರಿ"],
        ["यह मेरी किताब है.", " वह घर पर है.", " मैं जा रहा हूँ.", " के. वर्मा आए."],
        ["집에 가.", " 나중에 봐.", " 나는 학생이다."],
        ["राम आया।", "सीता गई॥", " हाँ।"],
        ["كيف حالك؟", " أنا بخير."],
        ["А. С. Пушкин жил здесь.", " Да!"],
        ["He works for NATO.", " She left.", " DO NOT ENTER.", " DANGER."],
        ["Он живёт в США.", " Я помог им.", " Они ушли."],
        ["Ludwig II. König von Bayern kam.", " Die Gasse ist eng.", " Wir gehen."],
        ["MM. Petit et Blanc arrivent.", " Gen. Lee left.", " GEN. LEE LEFT."],
        ["円周率は３．１４です。", "はい．", "そう"],
        ["သွားပြီး၊ ငါးဝယ်ခဲ့တယ်။", " ကောင်းတယ်"],
    ],
)
def test_sentences_of_many_scripts(sentences):
    assert cut_sentences("".join(sentences)) == sentences


@pytest.mark.parametrize(
    "text", ["3.14", "www.example.org", "a.b.c", "hello", "", "...x", ".", "J. Smith", "no. 5", "5 p.m. or so"]
)
def test_no_sentence_ends_here(text):
    assert [end for end in sentence_ends(text) if end < len(text)] == []


@pytest.mark.parametrize("seed", range(50))
def test_cutting_loses_nothing(seed):
    text = plain_text(seed)
    assert "".join(cut_sentences(text)) == text


@pytest.mark.parametrize(
    "piece", [".", "!?", "a.", ". ", '."', "'", "»", "? »", " ", "。", "。”", "．", "！", "A. ", "1. "]
)
def test_the_time_grows_with_the_length_only(piece):
    start = time.process_time()
    sentence_ends(f" {piece * 5_000} x{piece * 5_000}x")
    sentence_ends(f"{piece * 50_000}」と")
    assert time.process_time() - start < 5  # a quadratic pattern takes minutes
