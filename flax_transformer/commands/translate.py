"""Translates a file, or standard input, to standard output: one line for one line, in order, empty lines kept."""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator

from etils import epath

# Lines read before the first is translated: enough to sort by length, few enough to see the output grow.
CHUNK = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `translate`."""
    parser.add_argument("--workdir", required=True, help="the work directory that training left")
    parser.add_argument("--input", help="a UTF-8 text file; standard input if not given")
    parser.add_argument("--checkpoint", default="best", help='"best" (default), "latest" or a step')
    parser.add_argument(
        "--beam_size", type=int, default=4, help="hypotheses for each sentence; 1 is greedy (default 4)"
    )
    parser.add_argument("--alpha", type=float, default=0.6, help="exponent of the length penalty (default 0.6)")


def run(options: argparse.Namespace) -> None:
    """Translates chunk by chunk; raises ValueError or OSError with the mend."""
    if options.beam_size < 1:
        raise ValueError(f"--beam_size is {options.beam_size}: it must be at least 1")
    # jax loads here, so that --help answers at once.
    from flax_transformer.decoding.translator import Translator

    checkpoint = int(options.checkpoint) if options.checkpoint.isdigit() else options.checkpoint
    translator = Translator.from_workdir(options.workdir, step=checkpoint)
    lines = _read_lines(options.input)
    while chunk := list(itertools.islice(lines, CHUNK)):
        for translation in translator.translate(chunk, beam_size=options.beam_size, alpha=options.alpha):
            sys.stdout.buffer.write(translation.encode() + b"\n")
        sys.stdout.buffer.flush()


def _read_lines(path: str | None) -> Iterator[str]:
    if path is None:
        yield from _decode(sys.stdin.buffer, "standard input")
        return
    try:
        file = epath.Path(path).open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error}): check --input") from error
    with file:
        yield from _decode(file, path)


def _decode(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}:{number}: not UTF-8 ({error.reason}): convert it, e.g. with iconv") from error
