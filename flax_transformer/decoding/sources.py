"""Splits sources into the parts that a model can translate, each as token ids."""

import warnings
from collections.abc import Callable, Sequence

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.decoding.unreadable import UnreadableSentences
from flax_transformer.text.spelling import is_blank, quotable
from flax_transformer.text.splitting import split_sentence


def split_sources(
    vocabulary: Vocabulary, sentences: Sequence[str], longest: int, *, stacklevel: int
) -> list[list[list[int]]]:
    """The ids of each sentence, in several parts if it is too long; a blank sentence has no part.

    It warns of sentences that are split, of those that the vocabulary can hardly read, and of those that do not name
    the language that is wanted where the model needs that.

    Args:
        vocabulary: the source's vocabulary.
        sentences: the sentences; each may begin with a token that names a language, which then goes before each part.
        longest: the maximum length of a part, in tokens.
        stacklevel: where the warnings point to: 3 is the line that called the caller of this function.
    """
    encode = vocabulary.encode
    languages, texts = zip(*map(vocabulary.split_language, sentences), strict=True) if sentences else ((), ())
    split: list[list[list[int]]] = [[] for _ in sentences]
    shown = [number for number, text in enumerate(texts) if not is_blank(text)]
    for number, ids in zip(shown, encode([sentences[number] for number in shown]), strict=True):
        split[number] = [ids]
    if vocabulary.languages and not vocabulary.language_ids and not all(languages[number] for number in shown):
        warnings.warn(
            f"the model writes several languages, and a sentence does not name the one that is wanted: give "
            f"target_language, or begin each with one of {', '.join(vocabulary.languages[:8])}",
            stacklevel=stacklevel,
        )
    unreadable = UnreadableSentences(vocabulary)
    unreadable.add(sentences)
    unreadable.warn(stacklevel=stacklevel)
    for number, sentence in enumerate(sentences):
        tokens = sum(map(len, split[number]))
        if tokens > longest:

            def begun(part: str, language: str = languages[number]) -> list[int]:
                return encode([language + part])[0]

            def length(part: str, begun: Callable[[str], list[int]] = begun) -> int:
                return len(begun(part))

            split[number] = list(map(begun, split_sentence(texts[number], length, longest)))
            warnings.warn(
                f'a sentence of {tokens:,} tokens ("{quotable(sentence[:40])}…") is longer than model.max_length = '
                f"{longest}: it is translated in {len(split[number])} parts",
                stacklevel=stacklevel,
            )
    return split
