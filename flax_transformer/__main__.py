"""Parses `flax-transformer VERB [OPTIONS]` and runs the verb. Only the file of that verb in `commands/` is imported."""

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import flax_transformer
from flax_transformer.commands.config import split_changes
from flax_transformer.commands.process import (
    OutputClosed,
    complete_output,
    exit_for_device_error,
    is_device_error,
    let_output_fail,
    prepare_libraries,
    prepare_streams,
    warnings_in_one_line,
)

PROGRAM = "flax-transformer"
VERBS = {
    "train": "train a model on a corpus, or continue a training that was stopped",
    "translate": "translate a file, standard input, or sentences typed at a prompt",
    "align": "draw where a model looks while it translates a sentence",
    "evaluate": "score a model on a test set with BLEU, chrF and TER, or compare two models",
    "serve": "serve models over HTTP: LibreTranslate's API, explanations, and a page to try them",
    "score": "compute the log-probabilities and the perplexity of given translations",
    "clean": "leave out the pairs of a corpus that break rules, such as wrong script, length ratio and duplicates",
    "average": "average the weights of several checkpoints into one",
    "convert": "import OPUS-MT (Marian), M2M100 and NLLB models; export to CTranslate2, Marian, NLLB and StableHLO",
    "plan": "predict the memory and speed of a training step, on devices that you need not have",
}


# What looks like the name of a setting.
SETTING = re.compile(r"-{0,2}([a-z]\w*)(\.\w+)+")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line and suggests the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2, or the one that the verb set."""
        self.exit(self.get_default("mistake_status") or 2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses all arguments; options may be written with one dash or two.

        A verb that has --config accepts changes of its settings too, which `options.changes` holds afterwards.
        """
        words = list(map(self._with_two_dashes, arguments))
        changes: list[tuple[str, str]] = []
        if self.get_default("changes") is not None:
            words, changes = split_changes(words)
        options, unknown = self.parse_known_args(words)
        if unknown:
            name = unknown[0].partition("=")[0]
            if self.get_default("changes") is not None and name.endswith((".py", ".json")):
                self.error(f"unexpected argument {name}: a config is named by --config={name}")
            if self.get_default("changes") is not None and SETTING.fullmatch(name):
                first, _, rest = name.lstrip("-").partition(".")
                setting = rest if difflib.get_close_matches(first, ["config"]) else f"{first}.{rest}"
                self.error(f"there is no option {name}: a setting is changed by --config.{setting}=VALUE")
            if not name.startswith("-"):
                self.error(f"unexpected argument {name}: give every value after the name of its option")
            near = difflib.get_close_matches(name, re.findall(r"--\w+", self.format_help()), n=1)
            self.error(f"there is no option {name}" + (f": did you mean {near[0]}?" if near else ""))
        options.changes = changes
        return options

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No option: argparse would take "-hello" for -h with something behind it."""
        return []

    def _with_two_dashes(self, word: str) -> str:
        """An option that was written with one dash, with two; any other word as it is, e.g. a sentence."""
        name = f"-{word}".partition("=")[0]
        known = name in self._option_string_actions or name.startswith(("--config.", "--noconfig."))
        return f"-{word}" if word.startswith("-") and known else word


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> None:
    """Runs `flax-transformer VERB [OPTIONS]`; a mistake of the user's ends it with one line and exit status 1 or 2.

    Args:
        arguments: those of the command line if not given.
        program: what --help and errors call the program; `flax-transformer VERB` if not given.
    """
    output_is_open = prepare_streams()
    with complete_output(PROGRAM):
        _run(sys.argv[1:] if arguments is None else list(arguments), program, output_is_open)


def _run(arguments: list[str], program: str | None, output_is_open: bool) -> None:
    overview = _overview()
    if not arguments:
        overview.error(f"name a verb: {', '.join(VERBS)}")
    verb = overview.parse_args(arguments[:1]).verb
    program = program or f"{PROGRAM} {verb}"
    command = importlib.import_module(f"flax_transformer.commands.{verb}")
    parser = Parser(
        prog=program,
        usage=f"{program} {getattr(command, 'USAGE', '--workdir FOLDER [OPTIONS]')}",
        description=command.__doc__,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or an option added later would break a script that abbreviates another
    )
    parser.set_defaults(program=program, needs_output=True)
    command.add_arguments(parser)
    options = parser.parse_all(arguments[1:])
    if not options.needs_output:
        let_output_fail()  # a log that cannot be written must not end a training
    elif not output_is_open and not (verb in ("translate", "score") and options.output):
        sys.exit(f"{program}: standard output is closed, so nothing could be shown: add > FILE, or > /dev/null")
    prepare_libraries()
    try:
        with warnings_in_one_line(program):
            command.run(options)
    except OutputClosed:
        raise  # not an error: see `complete_output`
    except KeyboardInterrupt:
        sys.exit(130)  # as a program that Ctrl-C stops
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        sys.exit(f"{program}: a name with gs:// needs the packages for buckets: pip install 'flax_transformer[gcs]'")
    except (RuntimeError, MemoryError) as error:
        if not is_device_error(error):
            raise
        exit_for_device_error(program, error, command.MEMORY_REMEDY)


def _overview() -> Parser:
    overview = Parser(
        prog=PROGRAM,
        description='Train and use the Transformer of "Attention Is All You Need", in pure JAX and Flax.',
        epilog="verbs:\n" + "\n".join(f"  {verb:<12}{purpose}" for verb, purpose in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.add_argument("--version", action="version", version=f"{PROGRAM} {flax_transformer.__version__}")
    overview.add_argument(
        "verb", metavar="VERB", choices=VERBS, help=f"one of the verbs below; `{PROGRAM} VERB --help` explains each"
    )
    return overview


if __name__ == "__main__":
    main()
