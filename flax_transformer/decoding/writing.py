"""Makes translations of what the engine decoded: outputs of the parts of a sentence in, text and scores out."""

import itertools
from collections.abc import Sequence

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.decoding.requests import Output
from flax_transformer.decoding.results import Translation
from flax_transformer.decoding.settings import SearchSettings
from flax_transformer.text.splitting import join_parts

# The texts that replace an output's unknown pieces, in order.
Copies = list[str]


def write_translations(
    target: Vocabulary,
    parts: Sequence[Sequence[Output]],
    search: SearchSettings,
    prefix: str = "",
    copies: Sequence[Sequence[Copies]] | None = None,
) -> list[Translation]:
    """The translations of a sentence: of the best outputs of all parts, of the second best, and so on.

    So the first does not depend on how many there are. With a length penalty a later one may have a better score.

    Args:
        target: the target's vocabulary.
        parts: the outputs of each part of the sentence; no part at all has one empty translation.
        search: supplies the length penalty of the scores.
        prefix: what the translations begin with, as it was given.
        copies: for each part and output the texts to write in place of its unknown pieces; without, " ⁇ ".
    """
    ranks = zip(*parts, strict=False)
    own = itertools.repeat(None) if copies is None else zip(*copies, strict=False)
    return [
        write_translation(target, outputs, search, prefix, texts) for outputs, texts in zip(ranks, own, strict=False)
    ] or [Translation()]


def write_translation(
    target: Vocabulary,
    outputs: Sequence[Output],
    search: SearchSettings,
    prefix: str = "",
    copies: Sequence[Copies] | None = None,
) -> Translation:
    """One translation of a sentence, of one output for each part; other arguments as above."""
    ids = [token for output in outputs for token in output.ids.tolist()]
    log_probs = [log_prob for output in outputs for log_prob in output.log_probs.tolist()]
    return Translation(
        text=join_parts(_texts(target, outputs, prefix, copies)),
        tokens=tuple(target.pieces(ids)),
        ids=tuple(ids),
        token_log_probs=tuple(log_probs),
        log_prob=sum(log_probs),
        score=sum(log_probs) / search.penalty(len(ids)) if ids else 0.0,
    )


def _texts(target: Vocabulary, outputs: Sequence[Output], prefix: str, copies: Sequence[Copies] | None) -> list[str]:
    """The text of each part of a translation; the first begins with the prefix exactly as it was given."""
    if not outputs:
        return []
    begun = target.encode([prefix])[0][:-1] if prefix.strip() else []
    # Unknown characters of the prefix are not copied from the source: they are in the prefix, which replaces them.
    given = begun.count(target.unk_id)
    if copies is None:
        texts = target.decode(output.ids for output in outputs)
    else:
        texts = [
            target.decode_with(output.ids, [None] * given + list(own[given:]) if number == 0 else own)
            for number, (output, own) in enumerate(zip(outputs, copies, strict=True))
        ]
    if begun:
        # The decoded prefix has the vocabulary's spelling, and the unknown token for characters that it lacks.
        (spelled,) = target.decode([begun])
        written = target.split_language(prefix)[1] if target.language_ids else prefix
        if spelled and texts[0].startswith(spelled):
            texts[0] = written.strip() + texts[0].removeprefix(spelled)
    return texts
