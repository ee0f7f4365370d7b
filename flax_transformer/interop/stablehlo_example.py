"""Translates greedily with the programs in its folder. It only needs `pip install jax flatbuffers sentencepiece`.

python translate.py "A dog runs." "Two men talk."
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import sentencepiece

folder = Path(__file__).parent
ids = json.loads((folder / "ids.json").read_text("utf-8"))
encode, decode_step = (
    jax.jit(jax.export.deserialize(bytearray((folder / name).read_bytes())).call)
    for name in ("encode.stablehlo", "decode_step.stablehlo")
)
params = dict(np.load(folder / "params.npz"))
source, target = (sentencepiece.SentencePieceProcessor(str(folder / name)) for name in ("source.spm", "target.spm"))
number = {piece: index for index, piece in enumerate(ids["source"])}


def spell(text):
    """Splits text into pieces; a token such as >>fra<< in front names the target language of some models."""
    language, end, rest = text.partition("<<")
    known = language + end in ids["languages"]
    return [language + end, *source.encode(rest, out_type=str)] if known else source.encode(text, out_type=str)


rows = [[number.get(piece, ids["unk"]) for piece in spell(text)] for text in sys.argv[1:]]
padded = np.full((len(rows), max(map(len, rows)) + 1), ids["pad"], np.int32)
for place, row in zip(padded, rows, strict=True):
    place[: len(row) + 1] = [*row, ids["eos"]]
room = min(padded.shape[1] + 50, ids["room"] or 10**9)
state = encode(params, padded, np.zeros(room, np.int32))
tokens, output = np.full(len(rows), ids["start"], np.int32), []
for _ in range(room):
    state, logits = decode_step(params, state, tokens)
    tokens = np.argmax(np.array(logits.at[:, np.array(ids["banned"])].set(-np.inf)), axis=1).astype(np.int32)
    output.append(tokens)
    if (np.array(output) == ids["eos"]).any(axis=0).all():
        break
for row in np.array(output).T:
    pieces = [ids["target"][token] for token in row]
    text = target.decode_pieces(pieces[: pieces.index(ids["target"][ids["eos"]])] if ids["eos"] in row else pieces)
    print(text.replace("▁", " ").strip())
