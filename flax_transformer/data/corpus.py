"""Loads a corpus by its name, one string, as `ParallelText`: sentence pairs, and how often each appears in an epoch.

The name is one or more sources joined by " + ". A source may begin with a number as its weight: with `3*` its pairs
appear three times per epoch, with `0.5*` half of them appear in each epoch, by turns. The sources are

    files:SOURCE,TARGET                                    two UTF-8 files; line i of one translates line i of the other
    tsv:PATH                                               a UTF-8 file of source TAB target; more columns are ignored
    tfds:NAME:SPLIT?source=de&target=en&data_dir=FOLDER    a translation set of TensorFlow Datasets
    locale_phrases:SOURCE:TARGET:SPLIT?pairs=60000&parts=2&seed=0    the built-in corpus

for example `files:bible.kn,bible.en + 3*tsv:stories.tsv` or `tfds:wmt14_translate/de-en:train[:1%]`. Files may be
compressed with gzip, bzip2, xz or zstd. Any source may end in `?swap`, which makes sources of its targets and targets
of its sources, in `?tag=TAG`, which puts the tag and a space before each source, e.g. `?tag=<bt>` or `?tag=>>kan<<`, or
in both: `tsv:stories.tsv?swap&tag=>>kan<<`. A vocabulary that is trained on the corpus has a piece for each tag.

If `source` and `target` are not given, a TFDS set uses its supervised keys. The set is in `data_dir`; if that is not
given, in the folder that the environment variable TFDS_DATA_DIR names, or else in ~/tensorflow_datasets.

`~` at the beginning of a path is the home folder, `-` is standard input, and spaces around a path are ignored. Put a
path that contains a comma, a question mark or " + ", or that has spaces at its ends, in double quotes, and write a
double quote inside them twice: `files:"a, b.en","a, b.de"`. In a shell, then put the whole name in single quotes.
"""

import dataclasses
import difflib
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_transformer.data.lines import read_columns, read_lines
from flax_transformer.data.locale_phrases import locale_phrases
from flax_transformer.data.tfds_pairs import load_tfds
from flax_transformer.files import check_inputs, same_file, shown
from flax_transformer.text.spelling import is_blank
from flax_transformer.text.symbols import is_free_symbol

# A quoted path: it comes after the colon or a comma, and before a comma, " + " or the end.
_QUOTED = re.compile(r'(?:(?<=[:,])|^)\s*"(?:[^"]|"")+"(?=\s*(?:,|\?|$)| +\+ )')
FINGERPRINT_CHUNK = 10_000  # sentences hashed at once: one by one is slower, all at once takes as much memory again


@dataclasses.dataclass(frozen=True)
class ParallelText:
    """Unprocessed sentence pairs; pair i is `source[i]`, `target[i]`, `repeats[i]`.

    Attributes:
        source: sentences of the source language.
        target: their translations.
        repeats: how many times each pair appears in an epoch; on average, if it is not a whole number.
    """

    source: list[str]
    target: list[str]
    repeats: Sequence[int | float]

    def __post_init__(self):
        """Raises ValueError unless the three lists have the same length."""
        lengths = len(self.source), len(self.target), len(self.repeats)
        if len(set(lengths)) != 1:
            raise ValueError(f"source, target and repeats have {lengths} entries: give one of each for each pair")

    def __len__(self) -> int:
        """The number of pairs, each counted once."""
        return len(self.source)

    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 of all sentences and repeats, by which a changed corpus is noticed."""
        # The number of pairs determines how long the lists of numbers are, and these determine where each sentence
        # ends. So no two corpora give the same bytes, whatever characters they contain.
        digest = hashlib.sha256(len(self).to_bytes(8, "little"))
        whole = all(isinstance(times, int) for times in set(self.repeats))
        if not whole:
            digest.update(np.asarray(self.repeats, "<f8").tobytes())
        for numbers in (self.repeats if whole else [0] * len(self), map(len, self.source), map(len, self.target)):
            digest.update(np.fromiter(numbers, "<i8", len(self)).tobytes())
        for side in (self.source, self.target):
            for start in range(0, len(side), FINGERPRINT_CHUNK):
                # A lone surrogate, which no text should contain, must not raise an error here.
                digest.update("".join(side[start : start + FINGERPRINT_CHUNK]).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def load_corpus(spec: str, temperature: float = 1) -> ParallelText:
    """Reads all sources that `spec` names (see the top of this file) into memory, in order.

    Args:
        spec: the name of the corpus.
        temperature: with T, a source's share of an epoch grows with its number of pairs, times its weight, to the power
            of 1/T. An epoch stays as long as it is with T = 1.

    Raises:
        ValueError: a kind or option is unknown, or a file or set is missing, damaged or without pairs; the message
            names the file and the line.
    """
    check_inputs([(f"a file of corpus {spec!r}", path) for path in corpus_files(spec)])
    loaded = []
    for weight, name, options in _sources(spec):
        source, target = _load_pairs(name)
        source, target = (target, source) if options.swap else (source, target)
        if options.tag:
            source = [text if is_blank(text) else f"{options.tag} {text}" for text in source]
        loaded.append((weight, source, target))
    times = _with_temperature([weight for weight, _, _ in loaded], [len(side) for _, side, _ in loaded], temperature)
    return ParallelText(
        [text for _, source, _ in loaded for text in source],
        [text for _, _, target in loaded for text in target],
        [each for each, (_, source, _) in zip(times, loaded, strict=True) for _ in source],
    )


def _with_temperature(
    weights: Sequence[int | float], sizes: Sequence[int], temperature: float
) -> Sequence[int | float]:
    """How often the pairs of each source appear in an epoch."""
    if temperature == 1 or len(weights) == 1:
        return weights
    pairs = np.asarray(weights, np.float64) * np.asarray(sizes)
    shares = pairs ** (1 / temperature)
    # Processors differ in the last bits of a power, on which nothing may depend.
    return (shares / shares.sum() * pairs.sum() / sizes).round(9).tolist()


def corpus_files(spec: str) -> list[str]:
    """The text files that `spec` names, in order; a TFDS set and the built-in corpus have none."""
    files = []
    for _, name, _ in _sources(spec):
        kind, _, rest = name.partition(":")
        files += {"files": _split_paths, "tsv": lambda path: [_unquote(path)]}.get(kind, lambda _: [])(rest)
    return files


def corpus_tags(spec: str) -> list[str]:
    """The tags that `spec` puts before sources, each once."""
    return list(dict.fromkeys(options.tag for _, _, options in _sources(spec) if options.tag))


def corpus_languages(spec: str) -> list[tuple[str, str]]:
    """What may name the two languages of each source: the endings of two files, or the locales of the built-in corpus.

    Sources of other kinds are left out.
    """
    found = []
    for _, name, options in _sources(spec):
        kind, _, rest = name.partition(":")
        if kind == "files":
            names = [re.sub(r"\.(gz|bz2|xz|zst)$", "", path).rpartition(".")[2] for path in _split_paths(rest)]
        else:
            names = rest.split(":")[:2] if kind == "locale_phrases" else []
        if len(names) == 2:
            source, target = reversed(names) if options.swap else names
            found.append((source, target))
    return found


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is done with the pairs of a source: whether the sides change places, and the tag before each source."""

    swap: bool = False
    tag: str = ""


def _sources(spec: str) -> Iterator[tuple[int | float, str, _Options]]:
    """The weight, the name and the options of each source."""
    for part in _split(spec, " + "):
        weighted = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) ?\* ?(.*)", part.strip(), re.DOTALL)
        number, name = (float(weighted[1]), weighted[2]) if weighted else (1.0, part.strip())
        if not 0 < number < 1e6:
            raise ValueError(
                f"corpus {part!r} has weight {number:,g}: give more than 0 and less than a million, "
                "or leave the source out"
            )
        yield int(number) if number.is_integer() else number, *_take_options(name)


def _take_options(name: str) -> tuple[str, _Options]:
    """The name of a source without the options that all kinds of sources have, and these options."""
    *rest, query = _split(name, "?")
    words = query.split("&")
    own = [word for word in words if word == "swap" or word.startswith("tag=")]
    if not rest or not own:
        return name, _Options()
    others = [word for word in words if word not in own]
    if others and name.partition(":")[0] in ("files", "tsv"):
        known = _choose(others[0].partition("=")[0], ("swap", "tag"))
        raise ValueError(f"corpus {name!r}: option {others[0]!r} is not known: {known}")
    tags = [unicodedata.normalize("NFC", word.removeprefix("tag=")) for word in own if word != "swap"]
    if len(tags) > 1 or not all(map(is_free_symbol, tags)):
        raise ValueError(
            f"corpus {name!r}: give one tag, a word without white space that means nothing else to a vocabulary, as "
            "<s> does, e.g. ?tag=<bt>"
        )
    bare = "?".join([*rest, *(["&".join(others)] if others else [])])
    return bare, _Options("swap" in own, tags[0] if tags else "")


def _split(text: str, separator: str) -> list[str]:
    """Splits at a separator, but not within the quotes around a path."""
    masked = _QUOTED.sub(lambda quoted: "x" * len(quoted[0]), text)
    parts, start = [], 0
    for masked_part in masked.split(separator):
        parts.append(text[start : start + len(masked_part)])
        start += len(masked_part) + len(separator)
    return parts


def _split_paths(rest: str) -> list[str]:
    return [_unquote(path) for path in _split(rest, ",")]


def _unquote(path: str) -> str:
    path = path.strip()
    quoted = re.fullmatch(r'"((?:[^"]|"")+)"', path)
    return quoted[1].replace('""', '"') if quoted else path


def _load_pairs(name: str) -> tuple[list[str], list[str]]:
    loaders = {"files": _load_files, "tsv": _load_tsv, "tfds": _load_tfds, "locale_phrases": _load_locale_phrases}
    kind, _, rest = name.partition(":")
    if kind not in loaders:
        raise ValueError(f"corpus {name!r} is of an unknown kind: {_choose(kind, loaders)}, e.g. files:SOURCE,TARGET")
    try:
        source, target = loaders[kind](rest)
    except ValueError as error:
        *_, query = _split(rest, "?")
        if query == rest or kind not in ("files", "tsv"):
            raise
        raise ValueError(f"{error}; or correct its option ?{query}: there are ?swap and ?tag=TAG") from error
    if not source:
        raise ValueError(f"corpus {name!r} has no sentence pairs: check its path or split")
    return source, target


def _load_files(rest: str) -> tuple[list[str], list[str]]:
    paths = _split_paths(rest)
    if len(paths) != 2:
        quotes = "; put a path that contains a comma in double quotes" if len(paths) > 2 else ""
        raise ValueError(
            f"corpus 'files:{rest}' names {len(paths)} file{'s' * (len(paths) != 1)}: write files:SOURCE,TARGET{quotes}"
        )
    if same_file(*paths):
        warnings.warn(
            f"corpus 'files:{rest}' names the same file as source and as target: the model will learn to copy",
            stacklevel=4,  # the line that called `load_corpus`
        )
    source, target = (list(read_lines(path)) for path in paths)
    if len(source) != len(target):
        raise ValueError(
            f"{shown(paths[0])} has {len(source)} lines, {shown(paths[1])} has {len(target)}: "
            "line i of one must translate line i of the other"
        )
    return source, target


def _load_tsv(rest: str) -> tuple[list[str], list[str]]:
    rows = list(read_columns(_unquote(rest)))
    return [source for source, _ in rows], [target for _, target in rows]


def _load_locale_phrases(rest: str) -> tuple[list[str], list[str]]:
    names, options = _split_options(f"locale_phrases:{rest}", ("pairs", "parts", "seed"))
    fields = names.split(":")[1:]
    if len(fields) != 3 or "pairs" not in options:
        raise ValueError(f"corpus 'locale_phrases:{rest}': write locale_phrases:SOURCE:TARGET:SPLIT?pairs=NUMBER")
    for key, value in options.items():
        if not value.isdecimal():
            raise ValueError(f"corpus 'locale_phrases:{rest}': {key} is {value!r}: give a whole number")
    source_locale, target_locale, split = fields
    return locale_phrases(source_locale, target_locale, split, **{key: int(value) for key, value in options.items()})


def _load_tfds(rest: str) -> tuple[list[str], list[str]]:
    names, options = _split_options(f"tfds:{rest}", ("source", "target", "data_dir"))
    named = re.fullmatch(r"tfds:([^:]+(?::[\d.*]+)?):(.+)", names)  # names may have versions, splits may have slices
    if not named:
        raise ValueError(f"corpus 'tfds:{rest}': write tfds:NAME:SPLIT, e.g. tfds:wmt14_translate/de-en:train")
    name, split = named.groups()
    return load_tfds(name, split, **options)


def _split_options(name: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Splits `NAME?key=value&key=value` into the name and a mapping of options."""
    name, _, query = name.partition("?")
    options = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            raise ValueError(f"corpus '{name}?{query}': option {pair!r} is not known: {_choose(key, known)}")
        options[key] = value
    return name, options


def _choose(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"choose one of {', '.join(known)}"
