import re
import sys

import numpy as np
import pytest

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translation, Translator
from flax_transformer.interop.ctranslate2 import to_ctranslate2

ctranslate2 = pytest.importorskip("ctranslate2")

EVERYTHING = [
    {"norm": "post", "activation": "relu", "tie_embeddings": "three_way", "positions": "sinusoidal"},
    pytest.param(
        {"norm": "pre", "activation": "gelu", "tie_embeddings": "decoder", "positions": "sinusoidal_concatenated"},
        marks=pytest.mark.slow,
    ),
    {"norm": "post", "activation": "swish", "positions": "learned", "output_bias": True, "norm_epsilon": 1e-3},
    pytest.param(
        {"norm": "pre", "activation": "relu", "scale_embeddings": False, "output_bias": True, "norm_epsilon": 1e-6},
        marks=pytest.mark.slow,
    ),
    {"activation": "quick_gelu", "positions": "sinusoidal_tensor2tensor", "position_offset": 2, "zero_start": True},
]
every_model = pytest.mark.parametrize("options", EVERYTHING, ids=lambda options: "-".join(map(str, options.values())))


def pieces(vocabulary, rows):
    return [vocabulary.pieces(row) for row in rows]


def load(folder, compute_type="default"):
    return ctranslate2.Translator(str(folder), device="cpu", intra_threads=1, compute_type=compute_type)


@every_model
def test_scores_equal_those_of_this_library(make_model, tmp_path, sentences, options):
    model = make_model(**options)
    to_ctranslate2(model, tmp_path / "exported")
    source, target = (
        pieces(side, [row[:-1] for row in side.encode(lines)])
        for side, lines in ((model.vocabularies.source, sentences), (model.vocabularies.target, sentences[::-1]))
    )
    theirs = load(tmp_path / "exported").score_batch(source, target)
    ours = Translator(model).score(sentences, sentences[::-1])
    for found, wanted in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(found.log_probs, wanted.token_log_probs, atol=1e-4)


def test_translations_equal_those_of_this_library(make_model, tmp_path, sentences):
    model = make_model(output_bias=True)
    model.params["output_bias"][model.config.eos_id] += 6.0  # otherwise outputs continue until they are cut off
    to_ctranslate2(model, tmp_path / "exported")
    search = BeamSearch(beam_size=4, length_penalty="length", alpha=1.0, stopping="first", max_length=30)
    ours = Translator(model).hypotheses(sentences, search)
    banned = [[piece] for piece in model.vocabularies.target.pieces([model.config.pad_id, model.config.start_id])]
    theirs = load(tmp_path / "exported").translate_batch(
        pieces(model.vocabularies.source, [row[:-1] for row in model.vocabularies.source.encode(sentences)]),
        beam_size=4,
        length_penalty=1,
        max_decoding_length=30,
        min_decoding_length=0,
        suppress_sequences=banned,
        return_scores=True,
    )
    ended = [number for number, found in enumerate(ours) if len(found[0].ids) < 30]
    assert len(ended) > 6
    for number in ended:
        assert theirs[number].hypotheses[0] == list(ours[number][0].tokens[:-1])


@pytest.mark.parametrize("quantization", ["int8", "float16"])
def test_quantized_weights_equal_those_that_ctranslate2_makes(make_model, tmp_path, sentences, quantization):
    model = make_model()
    for name, options in (("whole", {}), ("small", {"quantization": quantization})):
        to_ctranslate2(model, tmp_path / name, **options)
    whole, small = ((tmp_path / name / "model.bin").stat().st_size for name in ("whole", "small"))
    assert small < 0.8 * whole
    source = pieces(model.vocabularies.source, model.vocabularies.source.encode(sentences))
    target = pieces(model.vocabularies.target, model.vocabularies.target.encode(sentences))

    def scores(name, compute_type):
        translator = load(tmp_path / name, compute_type=compute_type)
        return np.concatenate([result.log_probs for result in translator.score_batch(source, target)])

    exact, found = scores("whole", "float32"), scores("small", "default")
    assert np.abs(found - exact).mean() > 0  # weights that had not been quantized would give equal scores
    if quantization == "int8":  # how far int8 is from float32 depends on the processor's instructions
        np.testing.assert_allclose(found, scores("whole", "int8"), atol=1e-5)
    else:
        np.testing.assert_allclose(found, exact, atol=0.3)


def test_the_readme_s_program_prints_our_translation(make_model, tmp_path, capsys, monkeypatch):
    model = make_model(output_bias=True, positions="learned")
    model.params["output_bias"][model.config.eos_id] += 6.0  # otherwise outputs continue until they are cut off
    to_ctranslate2(model, tmp_path / "exported")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "exported" / "README.md").read_text(), re.DOTALL)
    assert len(program.strip().splitlines()) <= 7
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    search = BeamSearch(beam_size=4, length_penalty="length", alpha=1.0, stopping="first", max_length=40)
    translator = Translator(model)
    (ours,) = translator.hypotheses(["A dog runs."], search)
    # When learned positions run out, our output ends with the end of sentence, and theirs with one more token.
    assert ours[0].text and capsys.readouterr().out.startswith(ours[0].text)


def test_a_marian_vocabulary_keeps_its_ids_and_languages(make_model, vocabularies, tmp_path, sentences):
    source = vocabularies.source
    order = [*reversed(source.pieces(range(source.size))), ">>fra<<"]
    vocabulary = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(order)})
    ids = {"pad_id": vocabulary.pad_id, "eos_id": vocabulary.eos_id, "start_id": vocabulary.pad_id}
    model = make_model(pair=VocabularyPair(vocabulary, vocabulary), banned_ids=(vocabulary.pad_id, 7), **ids)
    to_ctranslate2(model, tmp_path / "exported")
    theirs = load(tmp_path / "exported").score_batch(
        pieces(vocabulary, [row[:-1] for row in vocabulary.encode([">>fra<< " + line for line in sentences])]),
        pieces(vocabulary, [[token for token in row[:-1] if token != 7] for row in vocabulary.encode(sentences)]),
    )
    translator = Translator(model)
    targets = [[token for token in row if token != 7] for row in vocabulary.encode(sentences)]
    ours = translator.score([">>fra<< " + line for line in sentences], [Translation(ids=tuple(row)) for row in targets])
    for found, wanted in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(found.log_probs, wanted.token_log_probs, atol=1e-4)
    assert ">>fra<<" in (tmp_path / "exported" / "README.md").read_text()


def test_a_recurrent_decoder_is_refused_by_name_and_nothing_is_written(make_model, tmp_path):
    with pytest.raises(ValueError, match="model.decoder_autoregression is 'ssru', but CTranslate2 needs 'self_atten"):
        to_ctranslate2(make_model(decoder_autoregression="ssru"), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_an_unknown_quantization_is_an_error_and_writes_nothing(make_model, tmp_path):
    with pytest.raises(ValueError, match="'int4': choose one of none, int8"):
        to_ctranslate2(make_model(), tmp_path / "exported", quantization="int4")
    assert not list(tmp_path.iterdir())


def test_without_its_package_the_export_names_its_extra(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2.converters.converter", None)
    with pytest.raises(ValueError, match=r"pip install 'flax_transformer\[interop\]'"):
        to_ctranslate2(make_model(), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
