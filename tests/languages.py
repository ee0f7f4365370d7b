"""Makes vocabularies of M2M100's and NLLB's kind from small SentencePiece models."""

from flax_transformer.data.fairseq_vocabulary import MASK, SPECIAL, FairseqVocabulary
from flax_transformer.data.vocabulary import VocabularyPair

LANGUAGES = {
    "NllbTokenizer": ("eng_Latn", "fra_Latn", "kan_Knda", "kat_Geor"),
    "M2M100Tokenizer": ("__en__", "__fr__", "__kn__"),
}
# What a config needs in order to be one of these models.
CONFIG = {
    "norm": "pre",
    "positions": "sinusoidal_tensor2tensor",
    "position_offset": 2,
    "pad_id": 1,
    "start_id": 2,
    "eos_id": 2,
}


def language_pair(vocabulary, tokenizer="NllbTokenizer", unused=2, language_last=False):
    """Both sides with the pieces of a vocabulary; they speak no language yet."""
    pieces = [piece for piece in vocabulary.pieces(range(vocabulary.size)) if piece not in SPECIAL]
    languages = LANGUAGES[tokenizer]
    mask = [MASK] if tokenizer == "NllbTokenizer" else []
    named = [*SPECIAL, *pieces, *languages, *mask]
    every = named + [f"madeupword{number}" for number in range(len(named), len(named) + unused)]
    made = FairseqVocabulary(vocabulary.to_bytes(), every, languages, tokenizer, language_last=language_last)
    return VocabularyPair(made, made.as_target())
