"""Makes random texts that are hard: every kind of character, marks and white space of all sorts, broken markup."""

import random

PIECES = [
    *(
        "Hello",
        "world",
        "Mr.",
        "Dr",
        "e.g.",
        "U.S.",
        "J.",
        "3.5",
        "no.",
        "12",
        "x",
        "Straße",
        "ಕನ್ನಡ",
        "ಕೆ.",
        "हिन्दी",
        "你好",
    ),
    *("はい", "สวัสดี", "مرحبا", "שלום", "𝔘𝔫𝔦", "é", "e\u0301", "\u0301", "ﬁ", "ß", "İ", "ǅ"),
    *(
        ".",
        "!",
        "?",
        "...",
        "…",
        "。",
        "！？",
        "।",
        "॥",
        "؟",
        ";",
        ":",
        ",",
        "—",
        "-",
        "*",
        "•",
        ">",
        "#",
        "1.",
        "2)",
        "(a)",
        "[x]",
    ),
    *('"', "'", "“", "”", "«", "»", "„", "(", ")", "「", "」", "[", "]", "{", "}"),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\t",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
        "\u200b",
    ),
    *(
        "\ufeff",
        "\u200d",
        "\u200e",
        "\u202e",
        "\u00ad",
        "\x00",
        "\x07",
        "\x1b",
        "\ud800",
        "\udfff",
        "\uffff",
        "\U0010ffff",
    ),
    *("😀", "👩‍👩‍👧", "🇩🇪", "1️⃣", "👍🏽", "☃", "©"),
    *(
        "https://a.b/c?d=e&f",
        "www.x.org",
        "a@b.org",
        "mailto:a@b",
        "&",
        "&amp;",
        "&lt;",
        "&nbsp;",
        "&#x41;",
        "&foo;",
        "&#0;",
    ),
]
MARKUP = [
    *(
        "<b>",
        "</b>",
        "<i>",
        "</i>",
        "<a href='x?a=1&b=2'>",
        "</a>",
        "<p>",
        "</p>",
        "<div class=x>",
        "</div>",
        "<ul><li>",
        "<li>",
    ),
    *(
        "<table>",
        "<tr>",
        "<td>",
        "</td>",
        "</table>",
        "<br>",
        "<br/>",
        "<img src=a>",
        "<x id='1'/>",
        "<g id='2'>",
        "</g>",
    ),
    *(
        "<code>",
        "</code>",
        "<pre>",
        "</pre>",
        "<script>",
        "</script>",
        "<style>",
        "<!--",
        "-->",
        "<!-- c -->",
        "<![CDATA[",
        "]]>",
    ),
    *(
        "<?php",
        "?>",
        "<!DOCTYPE html>",
        "<html>",
        "<body>",
        "</html>",
        "<span translate=no>",
        "</span>",
        "<em>",
        "</em>",
    ),
    *(
        "<",
        ">",
        "</",
        "<a",
        "<a x='",
        "<svg viewBox='0 0 1 1'/>",
        "<title>",
        "<textarea>",
        "<select>",
        "<sup>1</sup>",
        "<my-x @a='1'>",
    ),
]


def plain_text(seed):
    rng = random.Random(seed)
    joint = rng.choice(["", "", " "])
    characters = [chr(rng.choice([rng.randrange(0x110000), rng.randrange(0x3000)])) for _ in range(rng.randrange(4))]
    return joint.join(rng.choices([*PIECES, *characters], k=rng.randrange(1, 40)))


def broken_markup(seed):
    rng = random.Random(seed)
    if rng.random() < 0.03:
        return "".join(rng.choices(["<b>", "<div>", "<i>x", "x. "], k=200))
    return rng.choice(["", "", " "]).join(rng.choices([*PIECES, *MARKUP * rng.randrange(1, 3)], k=rng.randrange(1, 40)))


def nested_markup(seed):
    """Well-formed markup of elements within each other, and text."""
    rng = random.Random(seed)

    def element(depth):
        inside = "".join(content(depth + 1) for _ in range(rng.randrange(4)))
        name = rng.choice(["b", "i", "a", "span", "em"] + ["p", "div", "li"] * (depth < 2))
        return f"<{name} n='{rng.randrange(100)}'>{inside}</{name}>"

    def content(depth):
        if depth < 5 and rng.random() < 0.5:
            return element(depth)
        if rng.random() < 0.1:
            return rng.choice(
                ["<img src='a'/>", "<!-- c -->", "<br/>", "<code>f(x)</code>", "<b translate='no'>Ab Cd</b>"]
            )
        return (
            rng.choice(["", " "])
            + " ".join(rng.choices(["dog", "cat.", "The", "runs", "ಕನ್ನಡ", "&amp;", "two,"], k=3))
            + " "
        )

    return "".join(content(0) for _ in range(rng.randrange(1, 5)))
