"""Reads the vocabularies of M2M100 and NLLB models from the files that transformers stores, and writes them.

The ids of languages are in `tokenizer_config.json` or `tokenizer.json`; if not, they follow from the order in which
`special_tokens_map.json` or fairseq lists the languages.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from flax_transformer.data.fairseq_vocabulary import FORMS, MASK, PIECES_MODEL, SPECIAL, FairseqVocabulary
from flax_transformer.data.sentencepiece_vocabulary import read_pieces
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.fields import read_flag, read_json
from flax_transformer.interop.language_codes import M2M100, NLLB

# The most rows of a matrix that no piece uses: 2 in NLLB, 8 in M2M100, more where a size was rounded up.
UNUSED = 10_000
IDS, TOKENIZER, SETTINGS, LISTS = "vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


def read_vocabularies(folder: epath.Path, fields: Mapping[str, Any], size: int) -> VocabularyPair:
    """Reads the vocabularies of both sides; they speak the languages that `tokenizer_config.json` names, if any.

    Args:
        folder: where the files are.
        fields: those of `config.json`.
        size: the number of the model's embeddings.

    Raises:
        ValueError: a file is missing or damaged, or they do not belong together.
    """
    settings, lists = (read_json(folder / name) if (folder / name).exists() else {} for name in (SETTINGS, LISTS))
    if not (folder / PIECES_MODEL).exists():
        raise ValueError(f"{folder} lacks {PIECES_MODEL}: download all files of the model")
    model = (folder / PIECES_MODEL).read_bytes()
    tokenizer = _tokenizer(folder, fields, settings)
    try:
        named, mask = _named(folder, model, tokenizer)
        added = _added_tokens(folder, settings)
        form = FORMS[tokenizer][0]
        if not any(form.fullmatch(token) for token in added.values()):
            listed = [code for code in (*_listed(settings), *_listed(lists)) if form.fullmatch(code)]
            known = NLLB if tokenizer == "NllbTokenizer" else M2M100
            added = dict(enumerate([*(dict.fromkeys(listed) or known), *mask], len(named)))
        pieces = _in_order(named, added, size)
        vocabulary = FairseqVocabulary(
            model,
            pieces,
            [piece for piece in pieces[len(named) :] if form.fullmatch(piece)],
            tokenizer,
            language_last=read_flag(SETTINGS, settings, "legacy_behaviour", default=False),
        )
        languages = [settings.get(name) or "" for name in ("src_lang", "tgt_lang")]
        if not all(isinstance(language, str) for language in languages):
            raise ValueError(f"{SETTINGS}: src_lang or tgt_lang is not the name of a language")
        return VocabularyPair(vocabulary, vocabulary.as_target()).speaking(*languages)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _tokenizer(folder: epath.Path, fields: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The name of the tokenizer in transformers."""
    for found in (settings.get("tokenizer_class"), fields.get("tokenizer_class")):
        name = str(found or "").removesuffix("Fast")
        if name in FORMS:
            return name
        if name and name != "PreTrainedTokenizer":
            raise ValueError(
                f"{folder}: tokenizer_class is {name[:40]!r}, but only {' and '.join(FORMS)} can be converted: choose "
                "another model"
            )
    return "M2M100Tokenizer" if (folder / IDS).exists() else "NllbTokenizer"


def _named(folder: epath.Path, model: bytes, tokenizer: str) -> tuple[list[str], list[str]]:
    """The pieces whose ids do not depend on the languages, in order, and the pieces that follow the languages."""
    if tokenizer == "NllbTokenizer":
        processor = read_pieces(model)
        pieces = (processor.id_to_piece(number) for number in range(processor.get_piece_size()))
        return [*SPECIAL, *(piece for piece in pieces if piece not in SPECIAL)], [MASK]
    ids = read_json(folder / IDS)
    if any(type(number) is not int for number in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{IDS} is damaged (its ids are not 0, 1, 2, …): download it again")
    return sorted(ids, key=ids.__getitem__), []


def _added_tokens(folder: epath.Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """The tokens that were added to the pieces, by their ids."""
    found: list[tuple[Any, Any]] = []
    try:
        if settings.get("added_tokens_decoder"):
            found = [(number, token["content"]) for number, token in settings["added_tokens_decoder"].items()]
        elif (folder / TOKENIZER).exists():
            found = [(token["id"], token["content"]) for token in read_json(folder / TOKENIZER)["added_tokens"]]
        added = {int(number): token for number, token in found}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its added tokens cannot be read ({error!r:.80}): download the files again") from error
    if any(not isinstance(token, str) for token in added.values()):
        raise ValueError("its added tokens are not all text: download the files again")
    return added


def _listed(fields: Mapping[str, Any]) -> list[str]:
    """The special tokens that a file lists."""
    found = (fields.get(name) for name in ("extra_special_tokens", "additional_special_tokens"))
    listed = next((tokens for tokens in found if tokens and isinstance(tokens, list)), [])
    tokens = [token.get("content") if isinstance(token, dict) else token for token in listed]
    return [token for token in tokens if isinstance(token, str)]


def _in_order(named: list[str], added: Mapping[int, str], size: int) -> list[str]:
    """All pieces in the order of their ids, with names for the ids that have no piece."""
    for number, token in added.items():
        if not 0 <= number < size:
            raise ValueError(
                f"the id of {token!r} is {number}, but the model has {size} embeddings: a file belongs to another "
                "model, download all files again"
            )
        if number < len(named) and named[number] != token:
            raise ValueError(
                f"the id {number} is that of {token!r} and of {named[number]!r}: a file belongs to another model, "
                "download all files again"
            )
    if not len(named) <= size <= len(named) + len(added) + UNUSED:
        raise ValueError(
            f"the vocabulary has {len(named) + len(added)} pieces, but the model has {size} embeddings: a file belongs "
            "to another model, download all files again"
        )
    return named + [added.get(number) or f"madeupword{number}" for number in range(len(named), size)]


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
    pieces = source.pieces(range(source.size))
    first = min(source.language_ids)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"sep_token": "</s>", "cls_token": "<s>"}
    lists: dict[str, Any] = special | {"additional_special_tokens": list(source.languages)}
    settings: dict[str, Any] = lists | {
        "tokenizer_class": source.tokenizer,
        "src_lang": source.language or None,
        "tgt_lang": target.language or None,
        "model_max_length": max_length,
    }
    stored: dict[str, Any] = {LISTS: lists, SETTINGS: settings}
    if source.tokenizer == "NllbTokenizer":
        lists["mask_token"] = settings["mask_token"] = MASK
        settings["legacy_behaviour"] = source.language_last
        settings["added_tokens_decoder"] = {
            str(number): {"content": piece, "special": True}
            for number, piece in enumerate(pieces)
            if number in source.language_ids or piece == MASK
        }
    else:
        stored[IDS] = {piece: number for number, piece in enumerate(pieces[:first])}
        unused = source.size - first - len(source.languages)
        settings |= {"language_codes": "m2m100", "num_madeup_words": unused}
        # That tokenizer has its own list of languages, and computes their ids from its order.
        if tuple(pieces[first : first + len(M2M100)]) != M2M100 or len(source.languages) != len(M2M100):
            raise ValueError(
                "M2M100Tokenizer of transformers knows the 100 languages of M2M100 alone, and this model has "
                f"{len(source.languages)}: convert to-ctranslate2, or fine-tune NLLB for a new language"
            )
    texts = {name: json.dumps(content, ensure_ascii=False, indent=1) + "\n" for name, content in stored.items()}
    return {PIECES_MODEL: source.pieces_model} | {name: text.encode() for name, text in texts.items()}
