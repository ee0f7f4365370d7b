"""Trains a SentencePiece model on sentences, so that every character of the text that can have a piece gets one."""

import io
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from flax_transformer.experiment import VocabularyConfig
from flax_transformer.text.spelling import training_text

# In text SentencePiece takes the names of its special pieces for these pieces, and drops them.
_SPECIAL = re.compile(r"<(?=(?:s|/s|unk|pad)>)")
# It drops every sentence that holds this character, which it uses for itself.
_RESERVED = "▅"
# It writes this character for a space, and so reads it as one.
_SPACE = "▁"
# These cannot have a piece.
_IMPOSSIBLE = {"\0", _SPACE}


def train_pieces(sentences: Sequence[str], config: VocabularyConfig, special_ids: tuple[int, int, int, int]) -> bytes:
    """The serialised SentencePiece model; arguments and errors as in `Vocabulary.train`.

    Args:
        sentences: the text.
        config: size and kind.
        special_ids: of padding, beginning, end and unknown.
    """
    text = [training_text(sentence) for sentence in sentences]
    sample = _sample(text, config)
    if not any(sentence.strip() for sentence in sample):
        raise ValueError(f"{len(sample)} sentences without text cannot train a vocabulary: check the corpus")
    model = _train(sample, config, special_ids, required="")
    lost = _characters(text) - _characters_known(model)
    # A sample may lack rare characters of the whole text.
    if config.character_coverage == 1 and (required := lost - _IMPOSSIBLE):
        model = _train(sample, config, special_ids, required="".join(sorted(required)))
        lost = _characters(text) - _characters_known(model)
    _warn_of_lost(lost | (_characters(text) & _IMPOSSIBLE), text, config)
    return model


def _train(sentences: Sequence[str], config: VocabularyConfig, special_ids: tuple[int, ...], *, required: str) -> bytes:
    stand_in = _stand_in(sentences) if any(_RESERVED in text for text in (*sentences, required)) else _RESERVED
    pad_id, bos_id, eos_id, unk_id = special_ids
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Divided, the name of a special piece is text, and its characters are counted as often as they occur.
            sentence_iterator=(_SPECIAL.sub("< ", sentence).replace(_RESERVED, stand_in) for sentence in sentences),
            model_writer=model,
            model_type=config.model_type,
            # A character model at its limit drops rare characters in silence: leave room, and check below.
            vocab_size=1 << 21 if config.model_type == "char" else config.size,
            split_digits=config.split_digits,
            character_coverage=config.character_coverage,
            required_chars=required.replace(_RESERVED, stand_in) or None,
            # No NFKC: what is decoded is compared with references as they were written, and NFKC would turn an
            # ellipsis into three dots and full-width digits into narrow ones; SentencePiece's variant of it also
            # takes the zero-width non-joiner, which Kannada and Persian spell with, for a space. Only runs of
            # spaces are joined: no tokeniser that scores a translation sees them.
            normalization_rule_name="identity",
            remove_extra_whitespaces=True,
            # Longer lines are dropped in silence, and the default is 4192 bytes.
            max_sentence_length=1 << 30,
            # The bytes of the model depend on the number of threads, whatever the number of cores.
            num_threads=8,
            pad_id=pad_id,
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=unk_id,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), config)) from error
    size = len(_pieces(model.getvalue()))
    if size > config.size:
        raise ValueError(_too_small(size, config))
    return _with_reserved(model.getvalue(), stand_in)


def _stand_in(texts: Iterable[str]) -> str:
    """A private-use character that stands in none of the texts."""
    used = _characters(texts)
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in used)


def _with_reserved(model: bytes, stand_in: str) -> bytes:
    """The model with the reserved character in place of the one that stood in for it."""
    if stand_in == _RESERVED:
        return model
    from sentencepiece import sentencepiece_model_pb2  # loads protobuf, which this rare case alone needs

    read = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at run time
    for piece in read.pieces:
        piece.piece = piece.piece.replace(stand_in, _RESERVED)
    read.trainer_spec.required_chars = read.trainer_spec.required_chars.replace(stand_in, _RESERVED)
    return read.SerializeToString(deterministic=True)


def _pieces(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(number) for number in range(processor.get_piece_size())]


def _characters_known(model: bytes) -> set[str]:
    """The characters that the model can write: those that are pieces, and the space."""
    return {piece for piece in _pieces(model) if len(piece) == 1} | {" "}


def _characters(texts: Iterable[str]) -> set[str]:
    return set().union(*texts)


def _sample(sentences: Sequence[str], config: VocabularyConfig) -> Sequence[str]:
    if len(sentences) <= config.max_sentences:
        return sentences
    chosen = np.random.default_rng(config.seed).choice(len(sentences), config.max_sentences, replace=False)
    return [sentences[index] for index in np.sort(chosen)]


def _warn_of_lost(lost: set[str], sentences: Sequence[str], config: VocabularyConfig) -> None:
    """Tells how many characters of the text have no piece, which ones, and in how many sentences they stand."""
    if not lost:
        return
    count = sum(not lost.isdisjoint(sentence) for sentence in sentences)
    names = [f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip() for character in sorted(lost)]
    named = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    coverage = config.character_coverage
    what_to_do = f"; raise vocabulary.character_coverage, which is {coverage}, to keep more" if coverage < 1 else ""
    warnings.warn(
        f"the vocabulary has no piece for {len(lost):,} of the characters of the training text ({named}), which stand "
        f"in {count:,} of {len(sentences):,} sentences: translations cannot hold them{what_to_do}",
        stacklevel=4,
    )


def _explain(error: str, config: VocabularyConfig) -> str:
    """SentencePiece's complaint, in terms of the key to set."""
    if largest := re.search(r"too high .*<= (\d+)", error):
        return f"vocabulary.size is {config.size}, this text allows at most {largest[1]}: lower vocabulary.size"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return _too_small(int(smallest[1]), config)
    return f"SentencePiece cannot train with {config}: {error}"


def _too_small(smallest: int, config: VocabularyConfig) -> str:
    return (
        f"vocabulary.size is {config.size}, the characters of this text alone need {smallest}: "
        "raise vocabulary.size, or lower vocabulary.character_coverage"
    )
