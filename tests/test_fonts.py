import io
import warnings

import pytest

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import font_manager  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from flax_transformer import fonts  # noqa: E402
from flax_transformer.packaged_font import packaged_font  # noqa: E402

LETTER = "ಕ"


def draw(text):
    """Draws a text in the fonts that were found, with every warning an error."""
    figure = Figure()
    figure.text(0.5, 0.5, text, fontfamily=fonts.font_families(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), dpi=40)


@pytest.fixture
def bare_fonts(monkeypatch):
    """Matplotlib as on a machine that has no fonts but matplotlib's own."""
    own = [font for font in font_manager.fontManager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    monkeypatch.setattr(fonts, "packaged_font", lambda: None)
    fonts._warn_of_missing_characters.cache_clear()


def write_font(path, family, characters):
    """Writes a font in which each of the characters is a box."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((50, 0))
    for corner in ((50, 700), (450, 700), (450, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "box"])
    font.setupCharacterMap({ord(character): "box" for character in characters})
    font.setupGlyf(dict.fromkeys([".notdef", "box"], pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", "box"], (500, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return str(path)


@pytest.mark.usefixtures("bare_fonts")
def test_a_font_installed_after_matplotlib_listed_fonts_is_found(tmp_path, monkeypatch):
    paths = [write_font(tmp_path / "kannada.ttf", "Boxes Kannada", LETTER), str(tmp_path / "broken.ttf")]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    assert fonts.font_families(LETTER) == [*fonts.font_families("a"), "Boxes Kannada"]
    draw(LETTER)


@pytest.mark.usefixtures("bare_fonts")
def test_a_script_without_a_font_gives_one_warning_with_a_remedy():
    with pytest.warns(UserWarning, match="Kannada characters.*pip install weblate-fonts") as caught:
        families = [fonts.font_families(LETTER) for _ in range(2)]
    assert len(caught) == 1 and families[0][-1] == fonts.BOXES
    draw(LETTER)


@pytest.mark.usefixtures("bare_fonts")
def test_the_font_that_comes_with_the_extra_has_the_letters_of_kannada(monkeypatch):
    monkeypatch.setattr(fonts, "packaged_font", packaged_font)
    text = "46 ವರ್ಷಗಳ ಹಿಂದೆ, வணக்கம், नमस्ते"
    assert fonts.font_families(text)[-1] == "Kurinto Sans"
    draw(text)


def test_without_its_package_there_is_no_packaged_font(monkeypatch):
    monkeypatch.setattr("flax_transformer.packaged_font.PACKAGE", "no_such_package")
    assert packaged_font() is None
