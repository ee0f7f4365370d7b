"""Trains a Transformer: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`.

It is `flax-transformer train` for a checkout: flax_transformer/commands/train.py has the code, and --help the options.
"""

import sys

from flax_transformer.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], program="train.py")
