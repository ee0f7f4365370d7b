import json
import random

import pytest

WORDS = (
    "a dog Runs CAT. old! 😀 👩‍👩‍👧‍👧 12,5 ಸೋಮವಾರ ಕ್ಷ ಮ್‌ತ क्षि 。 你好！ مرحبا שלום ﷽ e\u0301\u0301\u0301 \u202eabc\u202c "
    "\u200b \ufeff \u0000 \ud800 \udfff \U000e0041 \u2028 \x0b \x1b[31m %s {0} https://example.org/?q=a&b=<c> a@b.c "
    "- * 1. > # ' \" \\ ⁇ ▁ </s> <s> <unk> kan_Knda"
)
PIECES = [*WORDS.split(" "), " ", "\n", "\n\n", "\t", "\r\n", "x" * 300, "ಕ" * 80]
MARKUP = """
<b> </b> <i </i> <p> </p> <a~href="x"> <a~href='"><script>alert(1)</script>'> </a> <br> <br/> <img~src=x~onerror=y>
<script>if(a<b)</script> <style>p{}</style> <pre> </pre> <code> </code> <!--~a~--> <!-- --> <![CDATA[ ]]> <?php ?>
<!DOCTYPE~html> <html> <body> </body> </html> <table><tr><td> </td></table> <svg><path/></svg> <textarea> </textarea>
<title> </title> <template> <span~translate="no"> </span> <p~class=notranslate> <li> <ul> &amp; &lt; &nbsp; &#0;
&#x110000; &bogus; & < > <> </ </> <x:y~z:w=1> <b~b=1~b=2>
""".split()
MARKUP = [piece.replace("~", " ") for piece in MARKUP]


def make_texts(count, seed, markup):
    rng = random.Random(seed)
    pieces = PIECES + MARKUP * 3 if markup else PIECES
    for number in range(count):
        if number % 97 == 0:
            deep = rng.randrange(10, 400)
            yield "<b>" * deep + "a dog" + "</b>" * rng.randrange(deep + 20)
        else:
            yield rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randrange(30)))


@pytest.mark.parametrize("count", [12, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["text", "html"])
def test_no_text_makes_the_server_fail(client, form, count):
    """The larger numbers make 10,000 texts; what may become of each is tested where texts are divided."""
    texts = list(make_texts(count, count, form == "html"))
    for start in range(0, count, 40):
        part = texts[start : start + 40]
        body = json.dumps({"q": part, "source": "en", "target": "de", "format": form})
        answer = client.post("/translate", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, (answer.text, part)
        translated = answer.json()["translatedText"]
        assert len(translated) == len(part)
        for text, found in zip(part, translated, strict=True):
            assert isinstance(found, str)
            if form == "text" and not any(letter.isalpha() for letter in text):
                assert found == text.encode(errors="replace").decode()
