"""Takes a verb and its options and leaves the work to that verb's file in `commands/`, the only one imported."""

import argparse
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "translate": "translate text with a trained model, one line for one line",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `flax-transformer VERB [OPTIONS]`; what a user can mend ends in one line and exit status 1.

    Args:
        arguments: those of the command line if not given.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    program = "flax-transformer"
    overview = argparse.ArgumentParser(
        prog=program,
        description='The Transformer of "Attention Is All You Need" in pure Flax.',
        epilog="verbs:\n" + "\n".join(f"  {verb:<12}{purpose}" for verb, purpose in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.add_argument("verb", metavar="VERB", choices=VERBS, help=f"see below; `{program} VERB --help` tells more")
    verb = overview.parse_args(arguments[:1]).verb
    command = importlib.import_module(f"flax_transformer.commands.{verb}")
    parser = argparse.ArgumentParser(prog=f"{program} {verb}", description=command.__doc__)
    command.add_arguments(parser)
    options = parser.parse_args(arguments[1:])
    try:
        command.run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"{program} {verb}: {error}")


if __name__ == "__main__":
    main()
