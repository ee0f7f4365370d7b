"""Reads the vocabularies of M2M100 and NLLB models from the files that transformers stores, and writes them.

The ids of languages are in `tokenizer_config.json` or `tokenizer.json`; if not, they follow from the order in which
`special_tokens_map.json` or fairseq lists the languages.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from flax_transformer.data.fairseq_vocabulary import FORMS, MASK, PIECES_MODEL, SPECIAL, FairseqVocabulary
from flax_transformer.data.sentencepiece_model import pieces_of
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.downloaded import damaged, read_file, read_json, read_json_if_there
from flax_transformer.interop.fields import Fields, shown
from flax_transformer.interop.language_codes import M2M100, NLLB
from flax_transformer.interop.transformers_files import TOKENIZER_CONFIG

# The most rows of a matrix that no piece uses: 2 in NLLB, 8 in M2M100, more where a size was rounded up.
UNUSED = 10_000
IDS, TOKENIZER, SPECIAL_TOKENS = "vocab.json", "tokenizer.json", "special_tokens_map.json"


def read_vocabularies(folder: epath.Path, fields: Fields, size: int) -> VocabularyPair:
    """Reads the vocabularies of both sides; they speak the languages that `tokenizer_config.json` names, if any.

    Args:
        folder: where the files are.
        fields: those of `config.json`.
        size: the number of the model's embeddings.

    Raises:
        ValueError: a file is missing or damaged, or they do not belong together.
    """
    settings = Fields(TOKENIZER_CONFIG, read_json_if_there(folder / TOKENIZER_CONFIG))
    special = Fields(SPECIAL_TOKENS, read_json_if_there(folder / SPECIAL_TOKENS))
    if (folder / TOKENIZER).exists() and not (folder / PIECES_MODEL).exists():  # transformers 5 saves no other file
        raise ValueError(
            f"{folder} lacks {PIECES_MODEL}, and {TOKENIZER} is not enough: copy that file from the model from which "
            "this one was fine-tuned"
        )
    model = read_file(folder / PIECES_MODEL)
    try:
        own_pieces = pieces_of(model)
    except ValueError as error:
        raise damaged(folder / PIECES_MODEL, error) from error
    tokenizer = _tokenizer(folder, fields, settings)
    form = FORMS[tokenizer][0]
    try:
        first, last = _around_languages(folder, own_pieces, tokenizer)
        added = _added_tokens(folder, settings)
        if not any(form.fullmatch(token) for token in added.values()):  # no file says what ids the languages have
            listed = [code for code in (*_listed(settings), *_listed(special)) if form.fullmatch(code)]
            known = NLLB if tokenizer == "NllbTokenizer" else M2M100
            added = dict(enumerate([*(dict.fromkeys(listed) or known), *last], len(first)))
        pieces = _in_order(first, added, size)
        vocabulary = FairseqVocabulary(
            model,
            pieces,
            [piece for piece in pieces[len(first) :] if form.fullmatch(piece)],
            tokenizer,
            language_last=settings.flag("legacy_behaviour"),
        )
        languages = [settings.get(name, "") for name in ("src_lang", "tgt_lang")]
        if not all(isinstance(language, str) for language in languages):
            raise ValueError(
                f"{TOKENIZER_CONFIG}: src_lang or tgt_lang is not the name of a language: download the file again"
            )
        return VocabularyPair(vocabulary, vocabulary.as_target()).speaking(*languages)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _tokenizer(folder: epath.Path, fields: Fields, settings: Fields) -> str:
    """The name of the tokenizer in transformers."""
    for source in (settings, fields):
        name = str(source.get("tokenizer_class", "")).removesuffix("Fast")
        if name in FORMS:
            return name
        if name and name != "PreTrainedTokenizer":
            raise ValueError(
                f"{folder}: tokenizer_class is {shown(name)}, but only {' and '.join(FORMS)} can be converted: choose "
                "another model"
            )
    return "M2M100Tokenizer" if (folder / IDS).exists() else "NllbTokenizer"


def _around_languages(folder: epath.Path, own_pieces: list[str], tokenizer: str) -> tuple[list[str], list[str]]:
    """The pieces before the languages, in the order of their ids, and those after them."""
    if tokenizer == "NllbTokenizer":
        return [*SPECIAL, *(piece for piece in own_pieces if piece not in SPECIAL)], [MASK]
    ids = read_json(folder / IDS)
    if any(type(number) is not int for number in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise damaged(IDS, "its ids are not 0, 1, 2, …")
    return sorted(ids, key=ids.__getitem__), []


def _added_tokens(folder: epath.Path, settings: Fields) -> dict[int, str]:
    """The tokens that were added to the pieces, by their ids."""
    found: list[tuple[Any, Any]] = []
    try:
        if tokens := settings.get("added_tokens_decoder"):
            found = [(number, token["content"]) for number, token in tokens.items()]
        elif (folder / TOKENIZER).exists():
            found = [(token["id"], token["content"]) for token in read_json(folder / TOKENIZER)["added_tokens"]]
        added = {int(number): token for number, token in found}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its added tokens cannot be read ({error!r:.80}): download the files again") from error
    if any(not isinstance(token, str) for token in added.values()):
        raise ValueError("its added tokens are not all text: download the files again")
    return added


def _listed(fields: Fields) -> list[str]:
    """The special tokens that a file lists."""
    found = (fields.get(name) for name in ("extra_special_tokens", "additional_special_tokens"))
    listed = next((tokens for tokens in found if tokens and isinstance(tokens, list)), [])
    tokens = [token.get("content") if isinstance(token, dict) else token for token in listed]
    return [token for token in tokens if isinstance(token, str)]


def _in_order(first: list[str], added: Mapping[int, str], size: int) -> list[str]:
    """All pieces in the order of their ids, with names for the ids that have no piece."""
    mend = "a file belongs to another model, download all files again"
    for number, token in added.items():
        if not 0 <= number < size:
            raise ValueError(f"the id of {token!r} is {number}, but the model has {size} embeddings: {mend}")
        if number < len(first) and first[number] != token:
            raise ValueError(f"the id {number} is that of {token!r} and of {first[number]!r}: {mend}")
    if not len(first) <= size <= len(first) + len(added) + UNUSED:
        raise ValueError(
            f"the vocabulary has {len(first) + len(added)} pieces, but the model has {size} embeddings: {mend}"
        )
    return first + [added.get(number) or f"madeupword{number}" for number in range(len(first), size)]


def files(pair: VocabularyPair, max_length: int) -> dict[str, bytes]:
    """The files from which transformers makes the tokenizer: contents by name.

    Raises:
        ValueError: the vocabularies are not those of M2M100 or NLLB.
    """
    source, target = pair.source, pair.target
    if not isinstance(source, FairseqVocabulary):
        raise ValueError(
            "to-nllb writes only models that came from-nllb, whose vocabularies know languages by code: convert "
            "to-marian or to-ctranslate2"
        )
    pieces, languages = source.all_pieces(), source.languages
    first = min(source.language_ids)
    special: dict[str, Any] = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"sep_token": "</s>", "cls_token": "<s>", "additional_special_tokens": list(languages)}
    settings: dict[str, Any] = {
        "tokenizer_class": source.tokenizer,
        "src_lang": source.language or None,
        "tgt_lang": target.language or None,
        "model_max_length": max_length,
    }
    stored: dict[str, Any] = {}
    if source.tokenizer == "NllbTokenizer":
        special["mask_token"] = MASK
        settings["legacy_behaviour"] = source.language_last
        settings["added_tokens_decoder"] = {
            str(number): {"content": piece, "special": True}
            for number, piece in enumerate(pieces)
            if number in source.language_ids or piece == MASK
        }
    # That tokenizer has its own list of languages, and computes their ids from its order.
    elif len(languages) == len(M2M100) and tuple(pieces[first : first + len(M2M100)]) == M2M100:
        settings |= {"language_codes": "m2m100", "num_madeup_words": source.size - first - len(M2M100)}
        stored[IDS] = {piece: number for number, piece in enumerate(pieces[:first])}
    else:
        raise ValueError(
            "M2M100Tokenizer of transformers knows the 100 languages of M2M100 alone, and this model has "
            f"{len(languages)}: convert to-ctranslate2, or fine-tune NLLB for a new language"
        )
    stored |= {SPECIAL_TOKENS: special, TOKENIZER_CONFIG: special | settings}
    texts = {name: json.dumps(content, ensure_ascii=False, indent=1) + "\n" for name, content in stored.items()}
    return {PIECES_MODEL: source.pieces_model} | {name: text.encode() for name, text in texts.items()}
