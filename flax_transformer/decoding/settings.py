"""The settings of beam search and of sampling, checked once.

They are hashable, so a compiled function can take them as a static argument. This file does not import jax, so a
command line can show their defaults at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from flax_transformer.ranges import ALPHA, AT_LEAST_NONE, BEAM_SIZE, COUNT, Range, check, setting

LENGTH_PENALTIES = ("paper", "length")
STOPPING = ("optimal", "first")
# Each hypothesis takes an array of this many tokens; larger ones would not fit into memory.
LONGEST = Range(at_most=1_000_000)

Settings = TypeVar("Settings", bound="SearchSettings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings that beam search and sampling have in common.

    Lengths are in tokens, including the end of sentence but not the start token.

    Attributes:
        num_return: hypotheses returned for each sentence.
        length_penalty: what log-probabilities are divided by: "paper" is ((5 + length) / 6) ** alpha (Wu et al. 2016,
            equation 14; section 6.1), and "length" is length ** alpha, as in CTranslate2 and transformers.
        alpha: the exponent of the length penalty; 0 switches it off.
        extra_length: maximum length of an output beyond that of its source (section 6.1).
        max_length: maximum length of an output, whatever its source; `None` for no fixed limit.
        min_length: minimum length of an output, unless another limit is less.
        banned: token ids that are never chosen.
        no_repeat_ngram: an output does not repeat any sequence of this many tokens; 0 allows all repetitions.
    """

    num_return: int = setting(1, Range(at_least=1, within=Range(at_most=100_000)))
    length_penalty: str = setting("paper", LENGTH_PENALTIES)
    alpha: float = setting(0.6, ALPHA)
    extra_length: int = setting(50, Range(at_least=0, within=LONGEST))
    max_length: int | None = setting(None, Range(at_least=1, within=LONGEST))
    min_length: int = setting(0, Range(at_least=0, within=LONGEST))
    banned: Sequence[int] = setting((), COUNT)
    # The compiled program grows with this number.
    no_repeat_ngram: int = setting(0, Range(at_least=0, within=Range(at_most=100)))

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self)

    @property
    def hypotheses(self) -> int:
        """How many hypotheses of each sentence are decoded side by side."""
        return self.num_return

    def penalty(self, length: Any) -> Any:
        """The number that divides the log-probability of `length` tokens; takes one length or an array of lengths."""
        return ((5 + length) / 6 if self.length_penalty == "paper" else length) ** self.alpha

    def replace(self: Settings, **changes: Any) -> Settings:
        """The same settings with some fields changed."""
        return dataclasses.replace(self, **changes)

    def limit(self, source_length: int) -> int:
        """The maximum length of an output for a source of `source_length` tokens."""
        return min(source_length + self.extra_length, self.max_length or source_length + self.extra_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch(SearchSettings):
    """Searches for the most probable outputs; a beam of one is greedy search.

    Attributes:
        beam_size: number of hypotheses kept for each sentence (section 6.1: 4).
        stopping: when the search of a sentence stops. "optimal": when no live hypothesis can become one of those
            returned; at each step every live hypothesis may end. "first": when `beam_size` hypotheses have ended,
            counting only ends that were among the `beam_size` best continuations, like transformers'
            `early_stopping=True`.
    """

    beam_size: int = setting(4, BEAM_SIZE)
    stopping: str = setting("optimal", STOPPING)

    def __post_init__(self):
        """Checks each field as above; raises ValueError also if `num_return` exceeds `beam_size`."""
        super().__post_init__()
        if self.num_return > self.beam_size:
            raise ValueError(
                f"num_return is {self.num_return}, but beam_size is {self.beam_size}: lower the first or raise the "
                "second"
            )

    @property
    def hypotheses(self) -> int:
        """How many hypotheses of each sentence are decoded side by side."""
        return self.beam_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(SearchSettings):
    """Draws `num_return` outputs for each sentence at random, returned in the order they were drawn.

    With `mbr` it draws that many instead, and those `num_return` are returned that are most like all of them, the best
    first (minimum Bayes risk decoding, `decoding/mbr.py`).

    Attributes:
        temperature: divides the logits; below 1 outputs are more predictable, above 1 more varied.
        top_k: draw only from this many of the most probable tokens; 0 for all.
        top_p: draw only from the most probable tokens that together have this probability; 1 for all.
        mbr: among how many outputs those are chosen that are most like the others; 0 returns all that are drawn.
    """

    # Outside these limits the divided logits would be infinite or all equal.
    temperature: float = setting(
        1.0, Range(above=0, within=Range(at_least=1e-9, at_most=1e9), hint="a beam of 1 is the limit at 0")
    )
    top_k: int = setting(0, AT_LEAST_NONE)
    top_p: float = setting(1.0, Range(above=0, at_most=1))
    mbr: int = setting(0, Range(at_least=0, within=Range(at_most=1000)))

    def __post_init__(self):
        """Checks each field as above; raises ValueError also if more outputs are returned than drawn."""
        super().__post_init__()
        if self.mbr and self.num_return > self.mbr:
            raise ValueError(
                f"num_return is {self.num_return}, but mbr is {self.mbr}: lower the first or raise the second"
            )

    @property
    def hypotheses(self) -> int:
        """How many outputs of each sentence are drawn side by side."""
        return self.mbr or self.num_return

    @property
    def drawn(self) -> "Sampling":
        """The search that draws all the outputs among which `mbr` chooses."""
        return self.replace(num_return=self.hypotheses, mbr=0)


def check_sampling(settings: Sampling, rngs: object) -> None:
    """Raises ValueError if a search by token ids cannot draw: it has no random keys, or is to compare texts."""
    if rngs is None:
        raise ValueError("sampling needs random keys: give rngs, one for each sentence")
    if settings.mbr:
        raise ValueError(
            f"mbr is {settings.mbr}: it compares texts, and this search has token ids alone: give these settings to "
            f"Translator.hypotheses, or draw the outputs with num_return={settings.mbr}"
        )


def in_words(search: SearchSettings) -> str:
    """Which search it is, e.g. "greedy search", "a beam of 4, alpha 0.6" or "sampling, temperature 0.7"."""
    if isinstance(search, Sampling):
        chosen = f", the one most like the others of {search.mbr}" if search.mbr else ""
        among = f", top_k {search.top_k}" if search.top_k else ""
        among += f", top_p {search.top_p:g}" if search.top_p < 1 else ""
        return f"sampling, temperature {search.temperature:g}{among}{chosen}"
    if search.hypotheses == 1:
        return "greedy search"
    penalty = "length^" if search.length_penalty == "length" else "alpha "
    return f"a beam of {search.hypotheses}, {penalty}{search.alpha:g}"
