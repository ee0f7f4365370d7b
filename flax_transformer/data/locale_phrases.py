"""Generates parallel phrases of two languages from Unicode's locale data (CLDR): a corpus that needs no download.

Babel writes the same date, time, quantity, price, place or language in both locales, so `ಮಾರ್ಚ್ 7, 2024` is paired with
`March 7, 2024`. A phrase is one such part, or several that are joined by the locale's own list pattern (`ಭಾರತ ಮತ್ತು
ಫ್ರಾನ್ಸ್`) or preceded by a place or a language (`ಭಾರತ: 5 ಗಂಟೆಗಳು`). All words come from CLDR, none from this file.

Terms used below: an *atom* is a name to be learned (a month, a unit, a currency, a place, a language); a *kind* is a
way of writing an atom, usually with numbers; a *part* is one atom written once.

Guarantees:
- Each source text has exactly one target text. If CLDR writes two atoms the same way in the source but not in the
  target, the later one is left out (`ಮಾರ್ಚ್` is both March and its abbreviation; English has `March` and `Mar`).
- A pair belongs to a split only if the checksums of both its texts select that split; other pairs are not used. So no
  source or target text occurs in two splits, whatever the seeds. A name alone is always training data.
- The training split begins with every atom of every kind by itself (about 750 pairs for Kannada and English), so every
  name in a held-out phrase also occurs in training.
"""

import calendar
import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from typing import Any

from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_interval, format_skeleton, format_time, format_timedelta
from babel.languages import get_official_languages
from babel.lists import format_list
from babel.numbers import format_currency, format_percent
from babel.units import format_unit

YEARS = (1950, 2049)
JOINTS = (": ", ", ")  # between a leading name and the text after it
LONGEST = 40  # characters for each of `parts`, so that phrases are short enough for a small model
PATIENCE = 5_000  # the corpus is exhausted when this many candidates in a row give no new pair

UNITS = tuple(
    "duration-second duration-minute duration-hour duration-day duration-week duration-month duration-year "
    "length-millimeter length-centimeter length-meter length-kilometer length-inch length-foot length-yard length-mile "
    "mass-milligram mass-gram mass-kilogram mass-tonne mass-ounce mass-pound volume-milliliter volume-liter "
    "volume-gallon volume-cup volume-teaspoon volume-tablespoon area-square-meter area-square-kilometer area-hectare "
    "area-acre speed-kilometer-per-hour speed-meter-per-second temperature-celsius temperature-fahrenheit power-watt "
    "power-kilowatt energy-kilocalorie energy-kilowatt-hour electric-volt digital-kilobyte digital-megabyte "
    "digital-gigabyte angle-degree".split()
)
CURRENCIES = tuple(
    "INR USD EUR GBP JPY CNY AUD CAD CHF SEK NOK DKK RUB BRL MXN ZAR KRW SGD HKD NZD THB IDR MYR PHP VND TRY PLN CZK "
    "HUF ILS AED SAR EGP KES NGN PKR BDT LKR NPR".split()
)
STEPS = ("second", "minute", "hour", "day", "week", "month", "year")
NOT_PLACES = {"QO", "XA", "XB", "ZZ"}  # CLDR's special codes: outlying Oceania, two pseudo-locales, the unknown region
ENGLISH = Locale("en")
PLACES = tuple(sorted(code for code in ENGLISH.territories if code not in NOT_PLACES))
# Languages that are official in a country, and in India also in a state, as Kannada is.
LANGUAGES = tuple(
    sorted({code for place in PLACES for code in get_official_languages(place, place == "IN", de_facto=True)})
)


@dataclass(frozen=True)
class Kind:
    """A way of writing an atom: `draw` adds random numbers to it, and `write` writes the result in a locale.

    A kind without numbers (`draw` is None) is a name. `weight` is its share among the names, or among the other kinds.
    """

    label: str
    weight: float
    atoms: tuple
    write: Callable[[Locale, Any], str]
    draw: Callable[[random.Random, Any], Any] | None = None

    def part(self, rng: random.Random, atom: Any) -> Callable[[Locale], str]:
        """One part: a function from a locale to the text."""
        thing = self.draw(rng, atom) if self.draw else atom
        return lambda locale: self.write(locale, thing)


def _day(rng, month):
    year = rng.randint(*YEARS)
    return date(year, month, rng.randint(1, calendar.monthrange(year, month)[1]))


def _days(rng, month):
    start = _day(rng, month)
    return start, start + timedelta(days=rng.randint(1, 60))


def _time(rng, hour):
    return time(hour, rng.choice((0, 15, 30, 45)) if rng.random() < 0.3 else rng.randint(0, 59))


def _moment(rng, month):
    return datetime.combine(_day(rng, month), _time(rng, rng.randint(0, 23)))


def _times(rng, hour):
    start = datetime.combine(date(2000, 1, 1), _time(rng, hour))
    return start, start + timedelta(minutes=5 * rng.randint(1, 120))


def _count(rng):
    return 1 if rng.random() < 0.1 else rng.randint(2, 60)


def _amount(rng):
    size = rng.random()
    if size < 0.5:
        return _count(rng)
    return rng.randint(61, 9999) if size < 0.8 else rng.randint(11, 999) / 10


def _price(rng):
    return rng.randint(1, rng.choice((100, 10_000))) if rng.random() < 0.5 else rng.randint(100, 99_999) / 100


def _date_style(style):
    return lambda locale, day: format_date(day, style, locale=locale)


def _date_skeleton(skeleton):
    return lambda locale, day: format_skeleton(skeleton, day, locale=locale)


def _interval(skeleton):
    return lambda locale, ends: format_interval(*ends, skeleton, locale=locale)


def _write_time(locale, hour):
    return format_time(hour, "short", locale=locale)


def _write_moment(locale, moment):
    day, hour = format_date(moment, "long", locale=locale), _write_time(locale, moment)
    return locale.datetime_formats["medium"].replace("'", "").replace("{1}", day).replace("{0}", hour)


def _write_relative(locale, step_and_time):
    step, delta = step_and_time
    # An infinite threshold keeps Babel from changing the unit; otherwise rounding could turn 14 days into 2 weeks.
    return format_timedelta(delta, step, threshold=float("inf"), add_direction=True, locale=locale)


def _draw_relative(rng, atom):
    step, sign = atom
    seconds = dict(zip(STEPS, (1, 60, 3600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400), strict=True))[step]
    return step, timedelta(seconds=sign * seconds * _count(rng))


def _write_quantity(locale, quantity, length="long"):
    unit, amount = quantity
    text = format_unit(amount, unit, length=length, locale=locale)
    if unit in text:
        raise LookupError(f"{locale} has no word for {unit}")  # Babel has fallen back to `5 length-yard`
    return text


def _write_short_quantity(locale, quantity):
    return _write_quantity(locale, quantity, "short")


def _write_duration(locale, quantities):
    return format_list([_write_quantity(locale, quantity) for quantity in quantities], "unit", locale=locale)


def _money(format_type):
    return lambda locale, money: format_currency(money[1], money[0], format_type=format_type, locale=locale)


def _write_percentage(locale, share):
    return format_percent(share, locale=locale)


MONTHS, HOURS = tuple(range(1, 13)), tuple(range(24))

# Half of the phrases of up to two parts are one value; of the rest, half are a name followed by a value, 35 % are two
# names and 15 % two values. With these weights most phrases are systematic, yet 60,000 pairs contain every place,
# language, currency and unit at least 50 times. If two kinds write the same text, the first in this list is used.
NAMES = (
    Kind("place", 70, PLACES, lambda locale, code: locale.territories[code]),
    Kind("language", 30, LANGUAGES, lambda locale, code: locale.languages[code]),
)
VALUES = (
    Kind("full date", 9, MONTHS, _date_style("full"), _day),
    Kind("long date", 12, MONTHS, _date_style("long"), _day),
    Kind("medium date", 5, MONTHS, _date_style("medium"), _day),
    Kind("date in digits", 6, MONTHS, _date_skeleton("yMd"), _day),
    Kind("month and day", 4, MONTHS, _date_skeleton("MMMMd"), _day),
    Kind("month and year", 4, MONTHS, _date_skeleton("yMMMM"), _day),
    Kind("date and time", 6, MONTHS, _write_moment, _moment),
    Kind("time", 9, HOURS, _write_time, _time),
    Kind("days", 5, MONTHS, _interval("yMMMd"), _days),
    Kind("hours", 5, HOURS, _interval("hm"), _times),
    Kind("relative time", 8, tuple(itertools.product(STEPS, (1, -1))), _write_relative, _draw_relative),
    Kind("quantity", 14, UNITS, _write_quantity, lambda rng, unit: (unit, _amount(rng))),
    Kind("short quantity", 5, UNITS, _write_short_quantity, lambda rng, unit: (unit, _amount(rng))),
    Kind(
        "duration",
        4,
        tuple(itertools.pairwise(f"duration-{step}" for step in reversed(STEPS))),
        _write_duration,
        lambda rng, units: [(unit, _count(rng)) for unit in units],
    ),
    Kind("price", 7, CURRENCIES, _money("name"), lambda rng, code: (code, _price(rng))),
    Kind("price with a sign", 4, CURRENCIES, _money("standard"), lambda rng, code: (code, _price(rng))),
    Kind("percentage", 1, ("%",), _write_percentage, lambda rng, _: rng.randint(1, 999) / 100),
)


def locale_phrases(
    source_locale: str, target_locale: str, split: str, *, pairs: int, parts: int = 2, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Returns `pairs` different sentence pairs of two CLDR locales as (source texts, target texts).

    Locales have CLDR's names: `"kn"`, `"en"`, `"pt_BR"`. `split` is `"train"`, `"valid"` or `"test"`; no text of one
    split occurs in another, whatever the seeds and numbers of pairs. `parts` is the maximum number of dates, amounts
    and names in a phrase: 1 for single ones, 3 for longer sentences. With the same seed, a smaller number of pairs
    gives the first of those that a larger number gives.

    Raises ValueError for an unknown locale or split, and if there are fewer different pairs than asked for.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split is {split!r}: use 'train', 'valid' or 'test'")
    if pairs < 0 or parts < 1:
        raise ValueError(f"pairs is {pairs} and parts is {parts}: ask for at least 0 pairs of at least 1 part")
    source, target = _locale(source_locale), _locale(target_locale)
    names, values = _unambiguous(source, target)
    rng = random.Random(f"{source} {target} {split} {parts} {seed}")
    opening = list(dict(_opening(rng, names, values, source, target)).items())
    rng.shuffle(opening)
    taken = {text for pair in opening for text in pair}
    found = dict(opening[:pairs]) if split == "train" else {}
    lists = [style for style in ("standard", "or") if style in source.list_patterns and style in target.list_patterns]
    fruitless = 0
    while len(found) < pairs:
        if fruitless == PATIENCE:
            raise ValueError(
                f"{source_locale}-{target_locale} has about {len(found)} distinct {split} pairs of up to {parts} "
                f"parts, not {pairs}: ask for fewer pairs or allow more parts"
            )
        phrase = _draw_phrase(rng, names, values, lists, parts)
        fruitless += 1
        source_text = _text(phrase, source)
        if _split_of(source_text) != split or source_text in found or source_text in taken:
            continue
        target_text = _text(phrase, target)
        if _split_of(target_text) != split or target_text in taken:
            continue
        if max(len(source_text), len(target_text)) <= LONGEST * parts:
            found[source_text] = target_text
            fruitless = 0
    return list(found), list(found.values())


def _locale(name: str) -> Locale:
    try:
        return Locale.parse(name)
    except (UnknownLocaleError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name!r} is not a CLDR locale: use a name such as 'kn', 'en' or 'pt_BR'; "
            "babel.localedata.locale_identifiers() lists them all"
        ) from error


def _text(phrase: Callable[[Locale], str], locale: Locale) -> str:
    # CLDR's thin and no-break spaces vary between locales, and a vocabulary's normalisation would remove them.
    return " ".join(phrase(locale).split())


def _split_of(text: str) -> str:
    bucket = (
        zlib.crc32(text.encode()) % 20
    )  # both texts must select the split, so 49 % of all pairs are train, 2 % valid, 2 % test
    return "train" if bucket < 14 else "valid" if bucket < 17 else "test"


class _Lowest(random.Random):
    """Always draws the lowest number, e.g. a count of 1, which gives the singular."""

    def random(self):
        return 0.0


def _unambiguous(source: Locale, target: Locale) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
    """Keeps the atoms that both locales can write and that the source writes differently from all earlier atoms."""
    meanings: dict[str, str] = {}

    def speaks(kind, atom):
        # All atoms use the same seeds and so the same numbers: texts are equal if and only if their words are.
        trials = [kind.part(rng, atom) for rng in (_Lowest(), *map(random.Random, range(3)))]
        try:
            texts = {_text(part, source): _text(part, target) for part in trials}
        except (LookupError, ValueError, NotImplementedError):  # Babel or one of the locales lacks this name or pattern
            return False
        if any(meanings.get(text, meaning) != meaning for text, meaning in texts.items()):
            return False
        meanings.update(texts)
        return True

    def keep(kinds):
        kept = (replace(kind, atoms=tuple(atom for atom in kind.atoms if speaks(kind, atom))) for kind in kinds)
        return tuple(kind for kind in kept if kind.atoms)

    names, values = keep(NAMES), keep(VALUES)
    if not names or not values:
        raise ValueError(f"CLDR has too few names of {source}-{target} for a corpus: choose other locales")
    return names, values


def _opening(rng, names, values, source, target) -> Iterator[tuple[str, str]]:
    """Every atom by itself. A name alone is always training data; an amount is drawn until both checksums agree."""
    for kind in (*names, *values):
        for atom in kind.atoms:
            for _ in range(50):
                part = kind.part(rng, atom)
                texts = _text(part, source), _text(part, target)
                if kind.draw is None or _split_of(texts[0]) == _split_of(texts[1]) == "train":
                    yield texts
                    break


def _draw_phrase(rng, names, values, lists, parts) -> Callable[[Locale], str]:
    """Draws one to `parts` parts: a value, a list of one kind, a name followed by values, or a language (place)."""
    count = rng.randint(1, parts)
    if count == 1:
        return _draw_list(rng, values, lists, 1)
    form = rng.random()
    if form < 0.5:
        joint = rng.choice(JOINTS)
        head, body = _draw_list(rng, names, lists, 1), _draw_list(rng, values, lists, count - 1)
        return lambda locale: head(locale) + joint + body(locale)
    if form < 0.65 and count == len(names) == 2:
        place, language = (kind.part(rng, rng.choice(kind.atoms)) for kind in names)
        return lambda locale: f"{language(locale)} ({place(locale)})"
    return _draw_list(rng, names if form < 0.85 else values, lists, count)


def _draw_list(rng, kinds, lists, count):
    # A list has only one kind, so that its commas are not confused with those inside dates and durations.
    (kind,) = rng.choices(kinds, [kind.weight for kind in kinds])
    items = [kind.part(rng, atom) for atom in rng.sample(kind.atoms, min(count, len(kind.atoms)))]
    if len(items) == 1:
        return items[0]
    style = rng.choice(lists)
    return lambda locale: format_list([item(locale) for item in items], style, locale=locale)
