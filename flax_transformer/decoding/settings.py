"""Takes what a user wants of a search and leaves it as settings, checked once: beam search or sampling.

They are hashable, so a compiled program can take them as a static argument, and cost no import of jax, so a command
line can show their defaults at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from flax_transformer.ranges import ALPHA, AT_LEAST_NONE, BEAM_SIZE, COUNT, Range, check, setting

LENGTH_PENALTIES = ("paper", "length")
STOPPING = ("optimal", "first")
# An output's room is an array of so many tokens for each hypothesis; a longer one fits no memory.
LONGEST = Range(at_most=1_000_000)

Settings = TypeVar("Settings", bound="SearchSettings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What beam search and sampling have in common.

    Lengths are in tokens, with the end of sentence and without the start.

    Attributes:
        num_return: hypotheses returned for each sentence.
        length_penalty: a log-probability is divided by ((5 + length) / 6) ** alpha under "paper" (Wu et al. 2016,
            equation 14; section 6.1), by length ** alpha under "length", as CTranslate2 and transformers do.
        alpha: that exponent; 0 leaves log-probabilities as they are.
        extra_length: an output is at most so many tokens longer than its source (section 6.1).
        max_length: an output is at most so long, whatever its source; `None` for no such limit.
        min_length: an output is at least so long, unless its other limits are shorter.
        banned: token ids that are never chosen.
        no_repeat_ngram: no sequence of so many tokens comes twice in an output; 0 lets any.
    """

    num_return: int = setting(1, Range(at_least=1, within=Range(at_most=100_000)))
    length_penalty: str = setting("paper", LENGTH_PENALTIES)
    alpha: float = setting(0.6, ALPHA)
    extra_length: int = setting(50, Range(at_least=0, within=LONGEST))
    max_length: int | None = setting(None, Range(at_least=1, within=LONGEST))
    min_length: int = setting(0, Range(at_least=0, within=LONGEST))
    banned: Sequence[int] = setting((), COUNT)
    # The program that is compiled grows with it.
    no_repeat_ngram: int = setting(0, Range(at_least=0, within=Range(at_most=100)))

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self)

    @property
    def hypotheses(self) -> int:
        """How many hypotheses of each sentence are decoded side by side."""
        return self.num_return

    def penalty(self, length: Any) -> Any:
        """What the log-probability of so many tokens is divided by; of a number, or of each in an array."""
        return ((5 + length) / 6 if self.length_penalty == "paper" else length) ** self.alpha

    def replace(self: Settings, **changes: Any) -> Settings:
        """The same settings but for these."""
        return dataclasses.replace(self, **changes)

    def limit(self, source_length: int) -> int:
        """The longest output for a source of so many tokens."""
        return min(source_length + self.extra_length, self.max_length or source_length + self.extra_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch(SearchSettings):
    """The most probable outputs that a beam finds; a beam of one is greedy search.

    Attributes:
        beam_size: beginnings kept for each sentence (section 6.1: 4).
        stopping: "optimal", when no live hypothesis can still enter those returned; each live hypothesis is offered
            its end at each step. Or "first", when `beam_size` hypotheses have ended, of which only those count whose
            end was among the `beam_size` best continuations: transformers' `early_stopping=True`.
    """

    beam_size: int = setting(4, BEAM_SIZE)
    stopping: str = setting("optimal", STOPPING)

    def __post_init__(self):
        """Checks each field; raises ValueError as above, or where more are wanted than the beam holds."""
        super().__post_init__()
        if self.num_return > self.beam_size:
            raise ValueError(
                f"num_return is {self.num_return}, beam_size is {self.beam_size}: a beam returns at most what it holds"
            )

    @property
    def hypotheses(self) -> int:
        """How many hypotheses of each sentence are decoded side by side."""
        return self.beam_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(SearchSettings):
    """Outputs drawn at random; `num_return` of each sentence, in the order they were drawn.

    Attributes:
        temperature: logits are divided by it: below 1 surer, above 1 more varied.
        top_k: only so many of the most probable tokens can be drawn; 0 for all.
        top_p: only the most probable tokens that together have this probability can be drawn; 1 for all.
    """

    # Outside these limits quotients of logits are infinite, or all alike.
    temperature: float = setting(
        1.0, Range(above=0, within=Range(at_least=1e-9, at_most=1e9), hint="a beam of 1 is the limit at 0")
    )
    top_k: int = setting(0, AT_LEAST_NONE)
    top_p: float = setting(1.0, Range(above=0, at_most=1))
