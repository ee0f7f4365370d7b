"""Takes a verb and its options and leaves the work to that verb's file in `commands/`, the only one imported."""

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import flax_transformer
from flax_transformer.commands.process import (
    complete_output,
    exit_for_device_error,
    is_device_error,
    prepare_libraries,
    prepare_streams,
    warnings_in_one_line,
)

PROGRAM = "flax-transformer"
VERBS = {
    "translate": "translate text, a file or sentence by sentence at a prompt",
    "evaluate": "BLEU, chrF and TER of a model on a test set, or of two models compared",
    "score": "log-probabilities and perplexity of given translations",
    "average": "average the weights of several checkpoints into one",
    "convert": "OPUS-MT (Marian) models in; CTranslate2, Marian and StableHLO out",
    "plan": "what training would take on a TPU slice that is not here, from its compiler",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses every argument; an option that does not exist is an error that names the nearest."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                self.error(f"{name} stands alone: every value follows its option")
            near = difflib.get_close_matches(name, re.findall(r"--\w+", self.format_help()), n=1)
            self.error(f"{name} is no option" + (f": did you mean {near[0]}?" if near else ""))
        return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `flax-transformer VERB [OPTIONS]`; what a user can mend ends in one line and exit status 1 or 2.

    Args:
        arguments: those of the command line if not given.
    """
    output_is_open = prepare_streams()
    with complete_output(PROGRAM):
        _run(sys.argv[1:] if arguments is None else list(arguments), output_is_open)


def _run(arguments: list[str], output_is_open: bool) -> None:
    overview = _overview()
    if not arguments:
        overview.error(f"name a verb, {', '.join(VERBS)}")
    verb = overview.parse_args(arguments[:1]).verb
    program = f"{PROGRAM} {verb}"
    command = importlib.import_module(f"flax_transformer.commands.{verb}")
    parser = Parser(
        prog=program,
        usage=f"{program} {getattr(command, 'USAGE', '--workdir FOLDER [OPTIONS]')}",
        description=command.__doc__,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or an option added later would break a script that abbreviates another
    )
    command.add_arguments(parser)
    # A verb that takes a config takes changes of it too, which its own flags read.
    changes = [word for word in arguments[1:] if word.startswith("--config.")] if verb == "plan" else []
    options = parser.parse_all([word for word in arguments[1:] if word not in changes])
    options.changes = changes
    if not output_is_open and not (verb in ("translate", "score") and options.output):
        sys.exit(f"{program}: standard output is closed, so that nothing could be shown: add > FILE, or > /dev/null")
    prepare_libraries()
    try:
        with warnings_in_one_line(program):
            command.run(options)
    except BrokenPipeError:
        raise  # not an error: see `complete_output`
    except KeyboardInterrupt:
        sys.exit(130)  # as a program that Ctrl-C stops
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except (RuntimeError, MemoryError) as error:
        if not is_device_error(error):
            raise
        exit_for_device_error(program, error, "lower --batch_tokens or --beam_size")


def _overview() -> Parser:
    overview = Parser(
        prog=PROGRAM,
        description='The Transformer of "Attention Is All You Need" in pure Flax.',
        epilog="verbs:\n" + "\n".join(f"  {verb:<12}{purpose}" for verb, purpose in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.add_argument("--version", action="version", version=f"{PROGRAM} {flax_transformer.__version__}")
    overview.add_argument("verb", metavar="VERB", choices=VERBS, help=f"see below; `{PROGRAM} VERB --help` tells more")
    return overview


if __name__ == "__main__":
    main()
