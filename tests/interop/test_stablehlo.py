import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.interop.ctranslate2 import to_ctranslate2
from flax_transformer.interop.marian import to_marian
from flax_transformer.interop.stablehlo import PLATFORMS, export_programs, to_stablehlo
from flax_transformer.model import Transformer
from tests.interop.conftest import MARIAN, SENTENCES


def batch(config, rows, width, seed=0):
    rng = np.random.default_rng(seed)
    source = np.full((rows, width), config.pad_id, np.int32)
    for row in source:
        length = rng.integers(1, width + 1)
        row[:length] = [*rng.integers(4, config.source_vocab_size, length - 1), config.eos_id]
    return source


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"norm": "pre", "positions": "learned", "output_bias": True}, marks=pytest.mark.slow),
        pytest.param({"decoder_autoregression": "ssru"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_programs_give_the_model_s_logits_for_any_batch_and_lengths(make_model, options):
    model = make_model(**options)
    encode, decode_step = (jax.export.deserialize(program.serialize()) for program in export_programs(model))
    assert set(encode.platforms) == set(PLATFORMS) == {"cpu", "cuda", "tpu"}
    params = flatten_dict(model.params, sep="/")
    for rows, width, room in ((2, 5, 7), (3, 8, 4)):
        source = batch(model.config, rows, width)
        target = np.random.default_rng(1).integers(4, model.config.target_vocab_size, (rows, room)).astype(np.int32)
        state = encode.call(params, source, np.zeros(room, np.int32))
        given = np.concatenate([np.full((rows, 1), model.config.start_id, np.int32), target[:, :-1]], axis=1)
        found = []
        for tokens in given.T:
            state, logits = decode_step.call(params, state, tokens)
            found.append(logits)
        wanted = Transformer(model.config).apply(
            {"params": model.params}, jnp.asarray(source), jnp.asarray(target), deterministic=True
        )
        np.testing.assert_allclose(np.stack(found, axis=1), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "ends"), [("sinusoidal", 3.0), pytest.param("learned", 6.0, marks=pytest.mark.slow)]
)
def test_the_example_translates_the_same_without_this_library(make_model, tmp_path, sentences, positions, ends):
    model = make_model(output_bias=True, positions=positions)
    model.params["output_bias"][model.config.eos_id] += ends  # otherwise outputs continue until they are cut off
    to_stablehlo(model, tmp_path / "exported")
    example = tmp_path / "exported" / "translate.py"
    assert len([line for line in example.read_text().splitlines() if line]) <= 40
    program = (
        "import runpy, sys; sys.modules['flax_transformer'] = sys.modules['flax'] = None; "
        "sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(example), *sentences],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    translator = Translator(model)
    # The example has one limit for all, 50 tokens beyond the longest source.
    longest = max(map(len, model.vocabularies.source.encode(sentences))) + 50 + 1  # and an end of sentence
    ours = translator.translate(sentences, BeamSearch(beam_size=1, max_length=longest, extra_length=longest))
    theirs = done.stdout.splitlines()
    # When learned positions run out, our output ends with the end of sentence, and theirs with one more token.
    assert [text[: len(mine)] for text, mine in zip(theirs, ours, strict=True)] == ours
    assert positions == "learned" or theirs == ours


def test_language_tokens_that_the_vocabulary_itself_has_are_split_as_in_training(make_model, tmp_path):
    """As in a model for several directions that was trained here: SentencePiece writes a space before the token."""
    lines = [f">>{('kan', 'eng')[number % 2]}<< {line}" for number, line in enumerate(SENTENCES)]
    settings = VocabularyConfig(size=110, byte_fallback=False, user_symbols=(">>kan<<", ">>eng<<"))
    model = make_model(pair=VocabularyPair.train(lines, lines, settings))
    wanted = model.vocabularies.source.pieces(model.vocabularies.source.encode([">>kan<< the cat"])[0])
    assert wanted[:2] == ["▁", ">>kan<<"]
    to_stablehlo(model, tmp_path / "exported")
    example = tmp_path / "exported" / "translate.py"
    found = {"__file__": str(example)}
    exec(example.read_text().partition("\nrows =")[0], found)
    assert found["spell"](">>kan<< the cat") == wanted[:-1]
    to_ctranslate2(model, tmp_path / "ct2")
    assert "language token, put before the text: >>" in (tmp_path / "ct2" / "README.md").read_text()
    with pytest.raises(ValueError, match="SentencePiece itself splits off >>.*: convert to-ctranslate2"):
        to_marian(dataclasses.replace(model, config=dataclasses.replace(model.config, **MARIAN)), tmp_path / "marian")
