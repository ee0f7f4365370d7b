"""Trains a SentencePiece model in which every character of the text that can have a piece gets one.

With byte fallback every other character is spelled in pieces of single bytes.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from flax_transformer.data.sentencepiece_model import AS_WRITTEN, parse, pieces_of
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.text.spelling import training_text
from flax_transformer.text.symbols import RESERVED, SPACE

# SentencePiece mistakes the names of its special pieces in text for these pieces, and drops them.
_SPECIAL = re.compile(r"<(?=(?:s|/s|unk|pad|0x[0-9A-F]{2})>)")
# These cannot have a piece.
_IMPOSSIBLE = {"\0", SPACE}


def train_pieces(sentences: Sequence[str], config: VocabularyConfig, special_ids: tuple[int, int, int, int]) -> bytes:
    """Trains and serialises a SentencePiece model; see `Vocabulary.train`, also for the errors.

    Args:
        sentences: the text.
        config: size and kind.
        special_ids: the ids of padding, beginning of sentence, end of sentence and unknown.
    """
    text = [training_text(sentence, compose=config.normalize) for sentence in sentences]
    sample = _sample(text, config)
    if not any(sentence.strip() for sentence in sample):
        raise ValueError(f"all {len(sample)} sentences are blank, so there is no text to train on: check the corpus")
    model = _train(sample, config, special_ids, required="")
    lost = _characters(text) - _characters_known(model)
    # The sample may lack rare characters of the whole text.
    if config.character_coverage == 1 and (required := lost - _IMPOSSIBLE):
        model = _train(sample, config, special_ids, required="".join(sorted(required)))
        lost = _characters(text) - _characters_known(model)
    lost |= _characters(text) & _IMPOSSIBLE
    _warn_of_lost(lost & {"\0"} if config.byte_fallback else lost, text, config)
    return model if config.normalize else _as_written(model)


def _train(sentences: Sequence[str], config: VocabularyConfig, special_ids: tuple[int, ...], *, required: str) -> bytes:
    stand_in = _stand_in(sentences) if any(RESERVED in text for text in (*sentences, required)) else RESERVED
    pad_id, bos_id, eos_id, unk_id = special_ids
    symbols = dict.fromkeys(training_text(symbol, compose=config.normalize) for symbol in config.user_symbols)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # With a space in it, the name of a special piece is ordinary text, and its characters are still counted.
            sentence_iterator=(_SPECIAL.sub("< ", sentence).replace(RESERVED, stand_in) for sentence in sentences),
            model_writer=model,
            model_type=config.model_type,
            # A character model silently drops rare characters at its limit, so the limit is high, and checked below.
            vocab_size=1 << 21 if config.model_type == "char" else config.size,
            split_digits=config.split_digits,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            user_defined_symbols=[*symbols],
            required_chars=required.replace(RESERVED, stand_in) or None,
            # No NFKC: decoded text is compared with references as they were written, and NFKC would turn an ellipsis
            # into three dots and full-width digits into narrow ones. SentencePiece's variant of it also replaces the
            # zero-width non-joiner, which the spelling of Kannada and Persian needs, by a space. Only runs of spaces
            # are joined, which no tokeniser that scores translations distinguishes.
            normalization_rule_name="identity",
            remove_extra_whitespaces=True,
            # Longer lines are silently dropped, and the default is 4192 bytes.
            max_sentence_length=1 << 30,
            # The bytes of the model depend on the number of threads (not of cores), so it is fixed.
            num_threads=8,
            pad_id=pad_id,
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=unk_id,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), config)) from error
    size = len(pieces_of(model.getvalue()))
    if size > config.size:
        raise ValueError(_too_small(size, config))
    return _with_reserved(model.getvalue(), stand_in)


def _stand_in(texts: Iterable[str]) -> str:
    """A private-use character that does not occur in any of the texts."""
    used = _characters(texts)
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in used)


def _with_reserved(model: bytes, stand_in: str) -> bytes:
    """Replaces the stand-in by the reserved character in the model."""
    if stand_in == RESERVED:
        return model
    read = parse(model)
    for piece in read.pieces:
        piece.piece = piece.piece.replace(stand_in, RESERVED)
    read.trainer_spec.required_chars = read.trainer_spec.required_chars.replace(stand_in, RESERVED)
    return read.SerializeToString(deterministic=True)


def _as_written(model: bytes) -> bytes:
    """Notes in the model that its text is not composed."""
    read = parse(model)
    read.normalizer_spec.name = AS_WRITTEN
    return read.SerializeToString(deterministic=True)


def _characters_known(model: bytes) -> set[str]:
    """The characters that the model can write: the pieces of one character, and the space."""
    return {piece for piece in pieces_of(model) if len(piece) == 1} | {" "}


def _characters(texts: Iterable[str]) -> set[str]:
    return set().union(*texts)


def _sample(sentences: Sequence[str], config: VocabularyConfig) -> Sequence[str]:
    if len(sentences) <= config.max_sentences:
        return sentences
    chosen = np.random.default_rng(config.seed).choice(len(sentences), config.max_sentences, replace=False)
    return [sentences[index] for index in np.sort(chosen)]


def _warn_of_lost(lost: set[str], sentences: Sequence[str], config: VocabularyConfig) -> None:
    """Warns how many characters of the text have no piece, which they are, and in how many sentences they occur."""
    if not lost:
        return
    count = sum(not lost.isdisjoint(sentence) for sentence in sentences)
    names = [f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip() for character in sorted(lost)]
    named = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    coverage = config.character_coverage
    what_to_do = f"; raise vocabulary.character_coverage, which is {coverage}, to keep more" if coverage < 1 else ""
    warnings.warn(
        f"the vocabulary has no piece for {len(lost):,} of the characters of the training text ({named}), which occur "
        f"in {count:,} of {len(sentences):,} sentences, so translations cannot contain them{what_to_do}",
        stacklevel=4,
    )


def _explain(error: str, config: VocabularyConfig) -> str:
    """Translates SentencePiece's error into terms of the setting to change."""
    if largest := re.search(r"too high .*<= (\d+)", error):
        return f"vocabulary.size is {config.size}, but this text allows at most {largest[1]}: lower vocabulary.size"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return _too_small(int(smallest[1]), config)
    return f"SentencePiece cannot train with {config}: {error}"


def _too_small(smallest: int, config: VocabularyConfig) -> str:
    and_bytes, without_bytes = "alone", ""
    if config.byte_fallback:
        and_bytes, without_bytes = "and the 256 bytes", ", or set vocabulary.byte_fallback=false"
    return (
        f"vocabulary.size is {config.size}, but the characters of this text {and_bytes} need {smallest}: "
        f"raise vocabulary.size, or lower vocabulary.character_coverage{without_bytes}"
    )
