"""Computes how probable a model finds given translations.

Reads pairs from the two files --source and --target, or from standard input, where
each line is a source, a tab and a target. For each pair it writes

  tsv       line number, log-probability, tokens, score
  jsonl     line, source, text, log_prob, score, tokens and token_log_probs

Logarithms are natural; tokens are those of the target, including its end of sentence.
The log-probability and the perplexity of the whole text go to standard error at the end.
"""

import argparse
import dataclasses
import itertools
import math
import sys
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
    add_length_penalty,
    add_model_options,
    in_languages,
    load_translator,
    pair_checkpoints,
    path,
    search_settings,
)
from flax_transformer.data.lines import read_columns
from flax_transformer.files import STANDARD, check_inputs, check_output

EXAMPLES = """\
examples:
  flax-transformer score --workdir=runs/mine --source=test.en --target=test.de > scores.tsv
  paste test.en test.de | flax-transformer score --workdir=runs/mine --format=jsonl
"""
# Pairs that are scored together: enough to sort by length, few enough that output appears steadily.
CHUNK = 2000
MEMORY_REMEDY = "lower --batch_tokens, or leave out lines that are very long"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `score`."""
    add_model_options(parser)
    pairs = parser.add_argument_group("the pairs")
    pairs.add_argument("--source", type=path, metavar="FILE", help="UTF-8 text, one sentence per line")
    pairs.add_argument("--target", type=path, metavar="FILE", help="file whose line i translates line i of the source")
    pairs.add_argument("--output", type=path, metavar="FILE", help="file for the scores; standard output if not given")
    pairs.add_argument("--format", choices=("tsv", "jsonl"), default="tsv", help="tsv (default) or jsonl; see above")
    add_length_penalty(parser.add_argument_group("the score", argument_default=argparse.SUPPRESS))


def run(options: argparse.Namespace) -> None:
    """Scores chunk by chunk; raises ValueError or OSError that says what to do."""
    search = search_settings(options)
    models = pair_checkpoints(options.workdir, options.checkpoint)
    if (options.source is None) != (options.target is None):
        raise ValueError(
            "--source and --target belong together: give both, or neither to read pairs from standard input"
        )
    if options.source:
        inputs = [("--source", options.source), ("--target", options.target)]
    else:
        inputs = [("the command", STANDARD)]
    check_inputs(
        inputs, instead=", or leave both out and write pairs to standard input, a tab between source and target"
    )
    output = options.output or STANDARD
    check_output("--output", output, inputs, options.workdir)
    total = count_lines(*(name for _, name in inputs))
    if total == 0:
        raise ValueError("there are no pairs: the input is empty")
    if not options.source and sys.stdin.isatty():
        print("type a source, a tab and a target on each line, and end with Ctrl-D", file=sys.stderr)
    pairs = read_all(options.source, options.target) if options.source else read_columns(STANDARD)
    (translator,) = in_languages([load_translator(models, options)], options)
    from flax_transformer.decoding.scoring import TooLong  # loads jax, so not for --help

    chunks = in_chunks(pairs, CHUNK)
    # An empty input and a language that lacks are reported before the output is opened, which empties it.
    first = next(chunks, [])
    if not first:
        raise ValueError("there are no pairs: the input is empty")
    translator.vocabularies.source.encode([source for source, _ in first])
    translator.vocabularies.target.encode([target for _, target in first])
    done, tokens, log_prob = 0, 0, 0.0
    with open_output(output) as file, progress_bar(total, beside=output) as bar:
        for chunk in itertools.chain([first], chunks):
            try:
                scored = translator.score([source for source, _ in chunk], [target for _, target in chunk], search)
            except TooLong as error:
                raise ValueError(f"line {done + error.number + 1}: {error.reason}") from error
            for number, ((source, _), pair) in enumerate(zip(chunk, scored, strict=True), start=done + 1):
                file.write(f"{_line(options.format, number, source, pair)}\n".encode())
                tokens += len(pair.tokens)
                log_prob += pair.log_prob
            file.flush()
            bar.update(len(chunk))
            done += len(chunk)
    print(
        f"{done} pairs, {tokens} tokens, log-probability {log_prob:.4f}, "
        f"perplexity {math.exp(-log_prob / tokens):.4f} per token",
        file=sys.stderr,
    )


def _line(form: str, number: int, source: str, pair: Any) -> str:
    if form == "tsv":
        return f"{number}\t{pair.log_prob:.6f}\t{len(pair.tokens)}\t{pair.score:.6f}"
    return json_line({"line": number, "source": source, **dataclasses.asdict(pair)})
