"""Cleans a parallel corpus: writes the pairs that break no rule, and reports how many each rule dropped.

Reads two files whose lines i belong together; they may be compressed. No text is
changed, so a clean corpus stays as it is. A pair counts for the first rule it breaks:

  unicode    bytes that are not UTF-8, replacement, control and non-characters, and a byte
             order mark at the beginning of a line that is not the first
  empty      a side shows nothing
  markup     a side has tags or entities of HTML, such as <b> and &nbsp;
  long       a side has more than --max_characters characters
  ratio      one side is more than --max_ratio times as long as the other
  letters    less than --min_letters of a side's visible characters are letters
  script     less than --min_script of a side's letters are in its language's script
             (with --source_language and --target_language)
  equal      source and target are the same text
  repeats    the same words, or parts of a word, follow one another more than --max_repeats
             times, or a letter or vowel sign more than nine times
  numbers    the numbers in digits differ
  held_out   a side is also a line of a file named by --held_out
  duplicate  the pair came before (with --duplicates: the source, the target, also in a pair
             that was dropped as a duplicate of the other side)
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from flax_transformer.commands.lines import in_chunks, open_output, progress_bar, read_all
from flax_transformer.commands.options import filled, path, positive
from flax_transformer.files import (
    Named,
    check_inputs,
    check_output,
    is_standard_output,
    is_stream,
    same_file,
)

EXAMPLES = """\
examples:
  flax-transformer clean --source=raw.kn --target=raw.en --output_source=clean.kn \\
      --output_target=clean.en --source_language=kn --target_language=en --held_out test.kn test.en
  flax-transformer clean --source=raw.kn.gz --target=raw.en.gz --dry_run --lines=dropped.tsv
"""
USAGE = "--source FILE --target FILE --output_source FILE --output_target FILE [OPTIONS]"
MEMORY_REMEDY = "give fewer --processes, or divide the files"
CHUNK = 2000  # pairs that a process examines at once
AHEAD = 4  # chunks that wait for each process, so that memory does not grow with the files
ANY_BYTES = "surrogateescape"  # bytes that are not UTF-8 become lone surrogates, which the rule unicode drops
STATEFUL = ("held_out", "duplicate")
NAMES = ("unicode", "empty", "markup", "long", "ratio", "letters", "script", "equal", "repeats", "numbers", *STATEFUL)
JOINERS = "\u200c\u200d"  # invisible, but they shape the letters around them, as in Kannada
WIDTH = 60  # characters of a side that the report shows
OUTPUTS = {"source": "output_source", "target": "output_target", "lines": "lines"}  # the option of each file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `clean`."""
    files = parser.add_argument_group("files")
    for side in ("source", "target"):
        files.add_argument(f"--{side}", type=path, required=True, metavar="FILE", help="text, one sentence per line")
    for side in ("source", "target"):
        files.add_argument(f"--output_{side}", type=path, metavar="FILE", help=f"the {side}s that stay")
    files.add_argument(
        "--held_out",
        type=path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="texts that no side of a pair may be in",
    )
    files.add_argument(
        "--lines",
        type=path,
        metavar="FILE",
        help="a file for what is dropped: line number, rule, source and target, between tabs",
    )
    files.add_argument(
        "--dry_run", action="store_true", help="only report; --output_source and --output_target not needed"
    )
    rules = parser.add_argument_group("rules", argument_default=argparse.SUPPRESS)
    for side in ("source", "target"):
        rules.add_argument(f"--{side}_language", type=filled, metavar="CODE", help="e.g. kn, en or kan_Knda")
    rules.add_argument("--max_characters", type=positive, metavar="N", help="(default 1000)")
    rules.add_argument(
        "--max_ratio", type=float, metavar="X", help="ten characters are added to both sides (default 3)"
    )
    rules.add_argument("--min_letters", type=float, metavar="X", help="(default 0.4)")
    rules.add_argument("--min_script", type=float, metavar="X", help="(default 0.5)")
    rules.add_argument("--max_repeats", type=positive, metavar="N", help="(default 4)")
    rules.add_argument(
        "--duplicates",
        nargs="+",
        action="extend",
        choices=("pair", "source", "target"),
        default=argparse.SUPPRESS,
        help="what may stand in one pair only (default pair)",
    )
    rules.add_argument(
        "--without", nargs="+", action="extend", choices=NAMES, metavar="RULE", help="rules that are not applied"
    )
    work = parser.add_argument_group("the work")
    work.add_argument("--examples", type=int, default=3, metavar="N", help="pairs shown for each rule (default 3)")
    work.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="(default: all cores)"
    )


def run(options: argparse.Namespace) -> None:
    """Cleans chunk by chunk; raises ValueError or OSError that says what to do."""
    # numpy loads with it, so not for --help.
    from flax_transformer.data.cleaning import CleaningRules, examine
    from flax_transformer.text.spelling import in_one_cell

    inputs, outputs = _check_files(options)
    fields = ("source_language", "target_language", "max_characters", "max_ratio", "min_letters", "min_script")
    given = {name: getattr(options, name) for name in (*fields, "max_repeats", "without") if name in options}
    try:
        rules = CleaningRules(**given)
    except ValueError as error:
        raise ValueError(f"--{error}" if str(error).split(" ")[0] in given else str(error)) from error
    if "min_script" in given and not {"source_language", "target_language"} & set(given):
        raise ValueError("--min_script needs --source_language or --target_language, which say what the script is")
    if options.held_out and "held_out" in rules.without:
        raise ValueError("--held_out names files, and --without leaves their rule out: remove one of them")
    dropping = _Dropping(options, rules.without)
    report = Report(options.examples)
    sides = options.source, options.target
    # Counting finds what is wrong with the files before anything is written; a stream can be read only once.
    total = None if any(map(is_stream, sides)) else sum(1 for _ in read_all(*sides, errors=ANY_BYTES))
    with _telling_what_is_incomplete(outputs), contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open_output(file)) for name, file in outputs.items()}
        bar = stack.enter_context(progress_bar(total, beside=""))
        chunks = in_chunks(read_all(*sides, errors=ANY_BYTES), CHUNK)
        for chunk, (broken, source_keys, target_keys) in _examined(chunks, examine, rules, options.processes, stack):
            broken = dropping.add(broken, source_keys, target_keys)
            for (source, target), rule in zip(chunk, broken, strict=True):
                report.add(source, target, rule)
                if rule and "lines" in files:
                    cells = str(report.pairs), rule, in_one_cell(source), in_one_cell(target)
                    files["lines"].write(_as_bytes("\t".join(cells)))
                elif not rule and "source" in files:
                    files["source"].write(_as_bytes(source))
                    files["target"].write(_as_bytes(target))
            bar.update(len(chunk))
    print(report.text(), end="")


@contextlib.contextmanager
def _telling_what_is_incomplete(outputs: Mapping[str, str]) -> Iterator[None]:
    """Adds to an error, which came while the outputs were written, that they are not to be used."""
    try:
        yield
    except (ValueError, OSError) as error:
        names = ", ".join(outputs.values())
        raise ValueError(f"{error} (incomplete: {names})" if names else str(error)) from error


def _check_files(options: argparse.Namespace) -> tuple[list[Named], dict[str, str]]:
    """The files that are read, with their options, and those that are written, by what goes there."""
    inputs = [("--source", options.source), ("--target", options.target)]
    inputs += [("--held_out", file) for file in options.held_out]
    check_inputs(inputs)
    outputs = {name: getattr(options, option) for name, option in OUTPUTS.items() if getattr(options, option)}
    if options.dry_run:
        outputs = {name: file for name, file in outputs.items() if name == "lines"}
    elif missing := [name for name in ("source", "target") if name not in outputs]:
        raise ValueError(f"--output_{missing[0]} is not given: name a file for the pairs that stay, or add --dry_run")
    for name, file in outputs.items():
        if is_standard_output(file):
            raise ValueError(f"--{OUTPUTS[name]} is {file}, but the report goes to standard output: name a file")
        check_output(f"--{OUTPUTS[name]}", file, inputs)
        for other in outputs:
            if other < name and same_file(file, outputs[other]) and file != os.devnull:
                raise ValueError(f"--{OUTPUTS[name]} and --{OUTPUTS[other]} are both {file}: name two files")
    return inputs, outputs


def _examined(
    chunks: Iterable[list[tuple[str, ...]]],
    examine: Callable[..., Any],
    rules: Any,
    processes: int,
    stack: contextlib.ExitStack,
) -> Iterator[tuple[list[tuple[str, ...]], Any]]:
    """Each chunk with what `examine` finds in it, in order; several processes work on chunks ahead."""
    if processes == 1:
        yield from ((chunk, examine(chunk, rules)) for chunk in chunks)
        return
    # This process alone handles Ctrl-C, and then leaves out what is waiting.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    stack.callback(pool.shutdown, cancel_futures=True)
    waiting: collections.deque[tuple[list[tuple[str, ...]], Future]] = collections.deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(examine, chunk, rules)))
            if len(waiting) > AHEAD * processes:
                oldest, found = waiting.popleft()
                yield oldest, found.result()
        for oldest, found in waiting:
            yield oldest, found.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that examined pairs was ended, probably because memory ran out: use fewer --processes"
        ) from error


class _Dropping:
    """The rules that need to know other pairs: those of held-out files, and those that came before."""

    def __init__(self, options: argparse.Namespace, without: Sequence[str]):
        from flax_transformer.data.cleaning import keys_of
        from flax_transformer.data.lines import read_lines
        from flax_transformer.data.seen import Seen

        self._held_out = Seen()
        if "held_out" not in without:
            for file in options.held_out:
                for chunk in in_chunks(read_lines(file), CHUNK):
                    self._held_out.add(keys_of([line for line in chunk if line.strip()]))
        kinds = [] if "duplicate" in without else getattr(options, "duplicates", ["pair"])
        self._seen = {kind: Seen() for kind in ("pair", "source", "target") if kind in kinds}

    def add(self, broken: list[str], source: Any, target: Any) -> list[str]:
        """The rule that each pair of a chunk breaks, these rules included."""
        import numpy as np

        broken = list(broken)
        for place in np.flatnonzero(self._held_out.has(source) | self._held_out.has(target)):
            broken[place] = broken[place] or "held_out"
        # A product with an odd number keeps 64 bits; exchanged sides give another sum.
        keys = {"pair": source * np.uint64(0x9E3779B97F4A7C15) + target, "source": source, "target": target}
        places = np.flatnonzero([not rule for rule in broken])  # a duplicate's other side counts as seen, too
        for kind, seen in self._seen.items():
            for place in places[~seen.add(keys[kind][places])]:
                broken[place] = "duplicate"
        return broken


class Report:
    """Counts what each rule drops, and keeps examples.

    Attributes:
        pairs: how many pairs there were.
        dropped: how many each rule dropped, by its name.
    """

    def __init__(self, examples: int):
        """Keeps this many examples of each rule."""
        self.pairs = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self._limit = examples
        self._examples: dict[str, list[tuple[int, str, str]]] = collections.defaultdict(list)

    def add(self, source: str, target: str, rule: str) -> None:
        """Counts a pair and the rule that it breaks; an empty rule means that it stays."""
        self.pairs += 1
        if rule:
            self.dropped[rule] += 1
            if len(self._examples[rule]) < self._limit:
                self._examples[rule].append((self.pairs, source, target))

    def text(self) -> str:
        """The report, in lines."""
        stay = self.pairs - self.dropped.total()
        lines = [f"{self.pairs:,} pairs, of which {stay:,} stay ({_percent(stay, self.pairs)})"]
        for rule in filter(self.dropped.__getitem__, NAMES):
            count = self.dropped[rule]
            lines.append(f"{rule:<10}{count:>12,}  {_percent(count, self.pairs)}")
            lines += [
                f"    line {number}: {_shortened(source)} | {_shortened(target)}"
                for number, source, target in self._examples[rule]
            ]
        return "".join(f"{line}\n" for line in lines)


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.2f} %" if total else "0 %"


def _shortened(text: str) -> str:
    text = "".join(each if each.isprintable() or each in JOINERS else repr(each)[1:-1] for each in text)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _as_bytes(line: str) -> bytes:
    return line.encode("utf-8", "surrogateescape") + b"\n"
