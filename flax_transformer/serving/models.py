"""The models that a server has, by the languages between which each translates."""

import dataclasses
import functools
from collections.abc import Sequence

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.serving.languages import Detector, language_name
from flax_transformer.serving.refusals import Refusal

AUTO = "auto"
PICTURED = (32, 64)  # positions and dimensions of the position vectors that the page shows


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        source: the language that it reads, as requests call it.
        target: the language that it writes.
        translator: translates with it.
        search: how it searches, unless a request wants another way.
    """

    source: str
    target: str
    translator: Translator
    search: BeamSearch

    @property
    def name(self) -> str:
        """What the metrics call it, e.g. "kn-en"."""
        return f"{self.source}-{self.target}"

    @property
    def streaming(self) -> BeamSearch:
        """How it searches where each token is told as it comes: greedily."""
        return self.search.replace(beam_size=1, num_return=1)

    @functools.cached_property
    def position_vectors(self) -> list[list[float]]:
        """The vectors of the first positions, as the page draws them; the first call uses the device."""
        positions, dimensions = PICTURED
        vectors = self.translator.inspector.position_vectors(positions)[:, :dimensions]
        return vectors.astype(float).round(3).tolist()


class Models:
    """The models of a server."""

    def __init__(self, served: Sequence[Served]):
        """Takes the models, of which each pair of languages may have one.

        Raises:
            ValueError: there is no model, or there are two for the same languages.
        """
        if not served:
            raise ValueError("there is no model to serve: name at least one")
        self.served = tuple(served)
        self._by_pair = {(model.source, model.target): model for model in served}
        if len(self._by_pair) < len(served):
            names = [model.name for model in served]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"there are two models for {twice}: leave one of them out")
        self.sources = tuple(dict.fromkeys(model.source for model in served))
        self.targets = tuple(dict.fromkeys(model.target for model in served))
        self._detector = Detector(self.sources)

    def find(self, source: str, target: str) -> Served:
        """The model for two languages; raises `Refusal` with status 400 if there is none."""
        for name, code, known in (("source", source, self.sources), ("target", target, self.targets)):
            if code not in known:
                raise Refusal(400, f"{name} {code[:60]!r} is not supported: this server has {', '.join(known)}")
        model = self._by_pair.get((source, target))
        if model is None:
            pairs = ", ".join(each.name for each in self.served)
            raise Refusal(400, f"{source} to {target} is not supported: this server has {pairs}")
        return model

    def detect(self, text: str, target: str = "") -> list[tuple[str, float]]:
        """The languages of a text with their probabilities, the most probable first; takes a few milliseconds.

        Args:
            text: the text.
            target: if not empty, only languages from which this one can be translated.
        """
        found = self._detector.detect(text)
        if not target:
            return found
        served = [(code, share) for code, share in found if (code, target) in self._by_pair]
        total = sum(share for _, share in served)
        return [(code, share / total if total else 0.0) for code, share in served]

    def languages(self) -> list[dict[str, object]]:
        """The languages with a code, a name and the codes of those into which each can be translated."""
        codes = dict.fromkeys([*self.sources, *self.targets])
        return [
            {
                "code": code,
                "name": language_name(code),
                "targets": [model.target for model in self.served if model.source == code],
            }
            for code in codes
        ]

    def close(self) -> None:
        """Ends the threads of all models; what is still being translated gets an error."""
        for model in self.served:
            model.translator.close()
