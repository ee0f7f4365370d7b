"""Reads serialised SentencePiece models, which every kind of vocabulary has."""

import sentencepiece


def read_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Reads a model, to split text with it; raises ValueError if the bytes are not one."""
    if not model:  # SentencePiece accepts an empty model, and fails only when it is used.
        raise ValueError("the SentencePiece model has 0 bytes: the file is empty, train the vocabulary again")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"these {len(model)} bytes are not a SentencePiece model: {error}") from error


def pieces_of(model: bytes) -> list[str]:
    """The pieces of a model in the order of its own ids; raises ValueError as `read_processor`."""
    processor = read_processor(model)
    return processor.id_to_piece(list(range(processor.get_piece_size())))
