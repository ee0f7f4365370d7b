"""Finds fonts that have the letters of a text, so that matplotlib draws no boxes in their place.

First come the fonts that matplotlib uses anyway, then those of the machine, and then the one that comes with the extra
`plots`.
"""

import functools
import unicodedata
import warnings

from matplotlib import font_manager, rcParams

from flax_transformer.packaged_font import packaged_font

BOXES = "Last Resort High-Efficiency"  # comes with matplotlib; draws one kind of box for each script


def font_families(text: str) -> list[str]:
    """The default font families, followed by those that have the characters of `text` which the default ones lack."""
    families = list(rcParams["font.family"])
    missing = {ord(character) for character in text}
    for family in families:
        missing -= _characters(font_manager.findfont(font_manager.FontProperties(family=[family])))
    for search in (_known_fonts, _new_fonts, _packaged_fonts):
        for font in search(missing) if missing else ():
            found = missing & _characters(font.fname)
            if found:
                families.append(font.name)
                missing -= found
    if missing:
        _warn_of_missing_characters(frozenset(map(_script, missing)))
        families.append(BOXES)
    return families


def _known_fonts(characters: set[int]) -> list[font_manager.FontEntry]:
    """The fonts that matplotlib knows; first upright sans-serif fonts that are named after the characters' scripts."""
    scripts = {_script(character) for character in characters}

    def strangeness(font: font_manager.FontEntry) -> tuple[bool, bool, bool, int, str]:
        named = any(script in font.name for script in scripts)
        return not named, "Sans" not in font.name, font.style != "normal", abs(int(font.weight) - 400), font.name

    fonts = [font for font in font_manager.fontManager.ttflist if font.name != BOXES]
    return sorted(fonts, key=strangeness)


def _new_fonts(characters: set[int]) -> list[font_manager.FontEntry]:
    """The fonts installed after matplotlib made its list of fonts, which it keeps in a file and does not update."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError, NotImplementedError):
            continue  # matplotlib cannot use this font, e.g. because it consists of bitmaps
    return [font for font in _known_fonts(characters) if font.fname not in known]


def _packaged_fonts(characters: set[int]) -> list[font_manager.FontEntry]:
    path = packaged_font()
    if path is None:
        return []
    if all(font.fname != str(path) for font in font_manager.fontManager.ttflist):
        font_manager.fontManager.addfont(path)
    return [font for font in font_manager.fontManager.ttflist if font.fname == str(path)]


@functools.cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # it was removed after matplotlib listed it
        return frozenset()


def _script(character: int) -> str:
    """The first word of the character's name, which for letters is their script, e.g. "Kannada"."""
    return unicodedata.name(chr(character), "unnamed").split()[0].title()


@functools.cache  # warns once per set of scripts
def _warn_of_missing_characters(scripts: frozenset[str]) -> None:
    names = ", ".join(sorted(scripts))
    warnings.warn(
        f"no installed font has all {names} characters, so boxes replace them: pip install weblate-fonts, which has "
        "most scripts, or install a Noto font for the script, and draw again",
        stacklevel=5,  # the line that called plot_masks or plot_attention
    )
