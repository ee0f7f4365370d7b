"""Reads serialised SentencePiece models, which every kind of vocabulary has."""

from typing import Any

import sentencepiece

# The name of the normalisation in a model whose text is not brought to NFC; SentencePiece itself does not use the name.
AS_WRITTEN = "as_written"


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


def byte_ids(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """The ids of the pieces for the bytes of a text; empty if the model has none."""
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    return ids if all(map(processor.is_byte, ids)) else []


def is_composed(model: bytes) -> bool:
    """Whether text is brought to NFC before a model divides it into pieces."""
    return AS_WRITTEN.encode() not in model or parse(model).normalizer_spec.name != AS_WRITTEN


def parse(model: bytes) -> Any:
    """The message that a model serialises; it can be changed."""
    from sentencepiece import sentencepiece_model_pb2  # loads protobuf, which only rare cases need

    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at run time
