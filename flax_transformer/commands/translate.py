"""Translates sentences, a file or standard input line by line; every line, even an empty
one, gives one line of output. With --interactive, translates what you type.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from flax_transformer.commands.lines import (
    count_lines,
    in_chunks,
    json_line,
    open_output,
    progress_bar,
    read_all,
)
from flax_transformer.commands.options import (
    add_model_options,
    add_search_options,
    in_languages,
    load_translator,
    pair_checkpoints,
    path,
    positive,
    search_settings,
    whole,
)
from flax_transformer.data.lines import read_lines, read_text
from flax_transformer.decoding.settings import SearchSettings
from flax_transformer.files import STANDARD, check_inputs, check_output, is_remote, shown
from flax_transformer.text.markup_tokens import read_tokens
from flax_transformer.text.spelling import in_one_cell, in_one_line, is_blank, quotable

USAGE = "--workdir=FOLDER [OPTIONS] [SENTENCE ...]"
EXAMPLES = """\
formats:
  text      the best translation of each line
  tsv       line number, rank, score and translation, up to --nbest rows for each line
  jsonl     an object for each line, with the source and its hypotheses: text, score,
            log_prob, tokens, ids, token_log_probs and, with --alignment, alignment. If
            the vocabulary lacks characters of the source, unknown_characters lists them
            and unknown_share is their share of all characters. A sentence that was so long
            that it was translated in parts has no alignment (null).

With a model for many languages, a line that begins with the token of a language, such
as "kan_Knda ", is in that language, and so is the translation that a line of --prefixes
with such a token begins; other lines are in the languages of the two options. Where the
tokens look like ">>kan<<", one before the source names the language of the translation:
--target_language=kan puts it before each line that has none.

With --markup the whole input is one page of HTML or XML, and so is the output.

Line ends within a translation, and tabs in tsv, are written as spaces; jsonl keeps them.

examples:
  flax-transformer translate --workdir=runs/mine "A dog runs." "Two men talk."
  flax-transformer translate --workdir=runs/mine --input=letters.en --output=letters.de
  echo "A dog runs." | flax-transformer translate --workdir=runs/mine
  flax-transformer translate --workdir=runs/mine --interactive
  flax-transformer translate --workdir=runs/mine --markup --input=page.html --output=page.de.html
  flax-transformer translate --workdir=runs/nllb --source_language=kan_Knda --target_language=eng_Latn
  flax-transformer translate --workdir runs/a runs/b --nbest=4 --format=tsv --input=letters.en
"""
MEMORY_REMEDY = "lower --batch_tokens or --beam_size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `translate`."""
    add_model_options(parser)

    text = parser.add_argument_group("the text")
    text.add_argument(
        "sentences",
        nargs="*",
        metavar="SENTENCE",
        help="the sentences to translate, each in quotes, after options that are written with =, or before all; "
        "without any, --input is read",
    )
    text.add_argument(
        "--input", type=path, metavar="FILE", help="UTF-8 text, one sentence per line; standard input if not given"
    )
    text.add_argument(
        "--output", type=path, metavar="FILE", help="file for the translations; standard output if not given"
    )
    text.add_argument("--format", choices=FORMATS, help="text (default), tsv or jsonl; see below")
    text.add_argument(
        "--nbest",
        dest="num_return",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="N",
        help="number of translations or samples of each sentence, best translation first (default 1); more than 1 need "
        "--format=tsv or jsonl, which give their scores too",
    )
    text.add_argument(
        "--alignment",
        nargs="?",
        type=whole,
        const=-1,
        metavar="LAYER",
        help="add to jsonl how much each target token attends to each source token: the cross-attention of this "
        "decoder layer, averaged over heads; layers count from 0, and the last is the default",
    )
    text.add_argument(
        "--prefixes",
        type=path,
        metavar="FILE",
        help="file whose line i is the beginning that the translation of line i must have",
    )
    text.add_argument(
        "--replace_unknown",
        action="store_true",
        help="where the model can only write its unknown piece, copy the characters of the source at which it looked; "
        "with --markup this is always so",
    )
    text.add_argument(
        "--markup",
        action="store_true",
        help="the input is one page of HTML, or XML, which is divided into sentences: its text is translated, and its "
        "markup comes back, with tags inside of sentences around the words that belong to them; needs the extra markup",
    )
    text.add_argument("--interactive", action="store_true", help="translate what you type at a prompt; Ctrl-D ends it")
    text.add_argument(
        "--buffer_lines",
        type=positive,
        default=2000,
        metavar="N",
        help="number of lines that are read, sorted by length and translated together; a larger number is faster, a "
        "smaller one shows results sooner (default 2000); samples depend on it",
    )

    add_search_options(parser)


def run(options: argparse.Namespace) -> None:
    """Translates chunk by chunk; raises ValueError or OSError that says what to do."""
    # Loads SentencePiece, so not for --help.
    from flax_transformer.decoding.unreadable import UnreadableSentences

    search = search_settings(options)
    models = pair_checkpoints(options.workdir, options.checkpoint)
    if options.sentences == [STANDARD] and not (options.input or options.interactive):
        options.sentences, options.input = [], STANDARD
    _check_sentences(options)
    if options.interactive:
        _check_interactive(options)
        (translator,) = in_languages([load_translator(models, options)], options)
        _converse(translator, search, options.seed)
        return
    _check_markup(options, search)
    _check_format(options, search)
    source, output = options.input or STANDARD, options.output or STANDARD
    inputs = [] if options.sentences else [("--input", source)]
    inputs += [("--prefixes", options.prefixes)] if options.prefixes else []
    check_inputs(inputs)
    also_read = [("--shortlist", options.shortlist)] if options.shortlist else []
    check_output("--output", output, inputs + also_read, options.workdir)
    page = read_text(source) if options.markup else ""
    total = None if options.markup else len(options.sentences) or count_lines(*(name for _, name in inputs))
    if not options.sentences and source == STANDARD and sys.stdin.isatty():
        print("type sentences and end with Ctrl-D; --interactive answers each at once", file=sys.stderr)
    (translator,) = in_languages([load_translator(models, options)], options)
    if not options.prefixes:
        translator.vocabularies.target.encode([""])  # reports a language that lacks before the output is opened
    if options.alignment is not None:
        # Reports a layer that does not exist now, not after the first chunk.
        translator.align([], [], layer=options.alignment)
    if options.markup:
        _translate_page(translator, page, search, options, output)
        return
    if options.prefixes:
        lines = read_all(source, options.prefixes)
    else:
        lines = ((line, "") for line in options.sentences or read_lines(source))
    chunks = in_chunks(lines, options.buffer_lines)
    first = next(chunks, [])
    translator.vocabularies.source.encode([text for text, _ in first if not is_blank(text)])  # the same for the source
    write_lines = FORMATS[options.format or "text"]
    done, unreadable = 0, UnreadableSentences(translator.vocabularies.source)
    with open_output(output) as file, progress_bar(total, beside=output) as bar, unreadable.warning_once():
        for chunk in itertools.chain([first] if first else [], chunks):
            sentences = [sentence for sentence, _ in chunk]
            prefixes = [prefix for _, prefix in chunk] if options.prefixes else None
            # A sentence that is repeated in a later chunk gets different samples.
            found = translator.hypotheses(
                sentences,
                search,
                prefixes=prefixes,
                seed=(options.seed + done) % 2**32,
                replace_unknown=options.replace_unknown,
            )
            described = _describe(translator, sentences, found, options.alignment)
            lacking = unreadable.add(sentences)
            rows = zip(sentences, lacking, described, strict=True)
            for number, (sentence, unknown, hypotheses) in enumerate(rows, start=done + 1):
                for line in write_lines(number, sentence, unknown, hypotheses):
                    file.write(f"{line}\n".encode())
            file.flush()
            bar.update(len(chunk))
            done += len(chunk)


def _check_sentences(options: argparse.Namespace) -> None:
    for word in options.workdir[1:]:
        if not (options.sentences or is_remote(word) or os.path.exists(word)):
            raise ValueError(
                f"--workdir names {shown(word)}, which does not exist: if it is a sentence, put it first, or write "
                "--workdir=FOLDER"
            )
    for name in ("input", "prefixes", "markup", "interactive"):
        if options.sentences and getattr(options, name):
            raise ValueError(f"--{name} cannot be combined with sentences on the command line: remove one of them")
    if len(options.sentences) == 1 and os.path.isfile(options.sentences[0]):
        warnings.warn(f"{shown(options.sentences[0])} is translated as a sentence: --input= names a file", stacklevel=2)


def _check_format(options: argparse.Namespace, search: SearchSettings) -> None:
    if search.num_return > 1 and options.format in (None, "text"):
        raise ValueError(
            f"--nbest is {search.num_return}, but --format=text has room for one translation: use --format=tsv or jsonl"
        )
    if options.alignment is not None and options.format != "jsonl":
        raise ValueError("--alignment needs --format=jsonl: text and tsv have no place for it")


def _check_markup(options: argparse.Namespace, search: SearchSettings) -> None:
    if not options.markup:
        return
    if search.num_return > 1:
        raise ValueError(f"--nbest is {search.num_return}, but --markup writes the page once: remove one of them")
    for name in ("format", "alignment", "prefixes"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for lines, and --markup translates a whole page: remove one of them")
    read_tokens("<br>")  # reports that lxml is missing


def _translate_page(translator: Any, page: str, search: Any, options: argparse.Namespace, output: str) -> None:
    # Loads jax, so not for --help.
    from flax_transformer.decoding.documents import translate_documents

    (translated,) = translate_documents(translator, [page], search, markup=True, seed=options.seed)
    with open_output(output) as file:
        file.write(translated.encode())


def _check_interactive(options: argparse.Namespace) -> None:
    for name in ("input", "output", "format", "alignment", "prefixes"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} cannot be combined with --interactive, which translates what you type: remove one of them"
            )
    for name in ("markup", "replace_unknown"):
        if getattr(options, name):
            raise ValueError(
                f"--{name} cannot be combined with --interactive, which shows words as they come: remove one"
            )


def _describe(
    translator: Any, sentences: Sequence[str], found: Sequence[Sequence[Any]], layer: int | None
) -> list[list[dict[str, Any]]]:
    """The fields of each hypothesis of each sentence, with its alignment if a layer is given."""
    described = [[dataclasses.asdict(hypothesis) for hypothesis in hypotheses] for hypotheses in found]
    if layer is None:
        return described
    from flax_transformer.decoding.results import in_parts

    pairs = [(sentence, one) for sentence, several in zip(sentences, found, strict=True) for one in several]
    end = translator.vocabularies.target.eos_id
    whole = [bool(one.ids) and not in_parts(one, end) for _, one in pairs]
    chosen = [pair for pair, is_whole in zip(pairs, whole, strict=True) if is_whole]
    alignments = iter(translator.align([sentence for sentence, _ in chosen], [one for _, one in chosen], layer=layer))
    for one, is_whole in zip(itertools.chain.from_iterable(described), whole, strict=True):
        if not one["ids"]:  # of a blank line, which has no tokens and may name no language
            one["alignment"] = {"source_tokens": [], "target_tokens": [], "weights": []}
            continue
        alignment = next(alignments) if is_whole else None
        one["alignment"] = alignment and {
            "source_tokens": alignment.source_tokens,
            "target_tokens": alignment.target_tokens,
            "weights": alignment.weights.astype(float).round(4).tolist(),
        }
    return described


def _text(number: int, sentence: str, unknown: Any, hypotheses: Sequence[dict[str, Any]]) -> list[str]:
    return [in_one_line(hypotheses[0]["text"])]


def _tsv(number: int, sentence: str, unknown: Any, hypotheses: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{number}\t{rank}\t{one['score']:.6f}\t{in_one_cell(one['text'])}"
        for rank, one in enumerate(hypotheses, start=1)
    ]


def _jsonl(number: int, sentence: str, unknown: Any, hypotheses: Sequence[dict[str, Any]]) -> list[str]:
    mark = {"unknown_characters": unknown.characters, "unknown_share": unknown.share} if unknown.characters else {}
    return [json_line({"line": number, "source": quotable(sentence)} | mark | {"hypotheses": hypotheses})]


# Each makes the output lines of one sentence from its line number, the sentence, the characters that the vocabulary
# lacks (`Unreadable`) and the hypotheses.
FORMATS: dict[str, Callable[[int, str, Any, Sequence[dict[str, Any]]], list[str]]] = {
    "text": _text,
    "tsv": _tsv,
    "jsonl": _jsonl,
}


def _converse(translator: Any, search: SearchSettings, seed: int) -> None:
    """Translates each sentence that is typed, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  Lets `input` edit a line and remember those before.
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal has its own encoding, files and pipes are UTF-8.
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors=errors)
    print("Type a sentence and press Enter; Ctrl-D ends.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn in itertools.count():
            sentence = input("> ")
            try:
                _answer(translator, sentence, search, (seed + turn) % 2**32)
            except ValueError as error:
                print(f"flax-transformer translate: {error}", file=sys.stderr)
    print()


def _answer(translator: Any, sentence: str, search: SearchSettings, seed: int) -> None:
    """Prints the translation: piece by piece if the search has one hypothesis, with scores if n-best are asked for."""
    if search.hypotheses == 1 and not getattr(search, "mbr", 0):
        for piece in translator.stream(sentence, search, seed=seed):
            print(piece, end="", flush=True)
        print()
    elif search.num_return == 1:
        print(translator.translate([sentence], search, seed=seed)[0])
    else:
        for hypothesis in translator.hypotheses([sentence], search, seed=seed)[0]:
            print(f"{hypothesis.score:10.4f}  {hypothesis.text}")
