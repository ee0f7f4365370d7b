import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.marian import from_marian, read_marian, to_marian
from flax_transformer.interop.transformers_tensors import concatenate_waves
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel
from tests.interop.conftest import MARIAN, TYINGS, change, edit_tensors, fails, same_tree


def translate(model, sentences):
    return Translator(model).translate(sentences)


@pytest.mark.parametrize(("tying", "activation"), list(zip(TYINGS, ["relu", "gelu", "swish"], strict=True)))
def test_an_exported_model_imports_as_the_same_model(make_model, tmp_path, sentences, tying, activation):
    model = make_model(tie_embeddings=tying, activation=activation, **MARIAN)
    to_marian(model, tmp_path / "marian")
    found = from_marian(tmp_path / "marian", tmp_path / "work")
    same_tree(found.params, model.params)
    # The limit of transformers includes the start token.
    assert dataclasses.replace(found.config, max_output=0) == model.config
    assert found.config.max_output == model.config.max_length - 1
    stored = TrainedModel.load(tmp_path / "work")
    same_tree(stored.params, model.params)
    assert isinstance(stored.vocabularies.source, MarianVocabulary)
    assert stored.vocabularies.source.encode(sentences) == model.vocabularies.source.encode(sentences)
    if tying == "none":
        assert translate(stored, sentences) == translate(model, sentences)


@pytest.mark.slow
def test_interleaved_positions_become_concatenated_without_other_changes(make_model):
    for tying in TYINGS:
        model = make_model(tie_embeddings=tying, output_bias=True)
        config, params = concatenate_waves(model.config, model.params)
        assert config.positions == "sinusoidal_concatenated"
        tokens = np.random.default_rng(0).integers(4, model.config.source_vocab_size, (2, 3, 7))
        before, after = (
            Transformer(each).apply({"params": tree}, *jnp.asarray(tokens), deterministic=True)
            for each, tree in ((model.config, model.params), (config, params))
        )
        np.testing.assert_allclose(before, after, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm": "pre"}, "model.norm is 'pre'"),
        ({"decoder_autoregression": "ssru"}, "model.decoder_autoregression is 'ssru', but transformers' Marian needs"),
        ({"zero_start": True}, "model.zero_start is True"),
        ({"positions": "learned"}, "model.positions is 'learned'"),
        ({"norm_epsilon": 1e-6}, "model.norm_epsilon is 1e-06"),
    ],
)
def test_an_option_that_marian_lacks_is_named(make_model, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        to_marian(make_model(**changes), tmp_path / "marian")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["folder", "file"])
def test_an_existing_folder_is_not_changed(make_model, folder, tmp_path, what):
    if what == "file":
        (tmp_path / "work").write_text("mine")
    else:
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        from_marian(folder, tmp_path / "work")
    place = tmp_path / "work" / "mine" if what == "folder" else tmp_path / "work"
    assert place.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"downloaded", "work"}


def test_a_place_where_a_disk_is_mounted_cannot_be_the_target(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match="where a disk is mounted, .*: give a folder inside it"):
        from_marian(folder, tmp_path / "work")


def test_an_empty_folder_can_be_the_target(folder, tmp_path):
    (tmp_path / "work").mkdir()
    from_marian(folder, tmp_path / "work")
    assert TrainedModel.load(tmp_path / "work").config.positions == "sinusoidal_concatenated"


@pytest.mark.parametrize(
    ("file", "field", "value", "match"),
    [
        ("config.json", "normalize_before", True, "normalize_before is True"),
        ("config.json", "normalize_embedding", True, "normalize_embedding is True"),
        ("config.json", "model_type", "bart", "model_type is 'bart'"),
        ("config.json", "model_type", "m2m_100", "has a model of type m2m_100: convert it with from-nllb"),
        ("config.json", "activation_function", "tanh", "activation_function is 'tanh'"),
        ("config.json", "decoder_ffn_dim", 32, "encoder_ffn_dim is 24 and decoder_ffn_dim is 32"),
        ("config.json", "rotary_base", 500, "rotary_base is 500"),
        ("config.json", "d_model", "16", "d_model is '16'"),
        ("config.json", "vocab_size", 99, "source vocabulary has 110 pieces, but config.json says 99"),
        ("config.json", "pad_token_id", 4, "pad_token_id is 4 in config.json and 0 in generation_config.json"),
        ("generation_config.json", "forced_eos_token_id", 5, "forced_eos_token_id is 5, but only eos_token_id = 2"),
        ("generation_config.json", "bad_words_ids", [[3, 4]], r"bad_words_ids is \[\[3, 4\]\]"),
        ("generation_config.json", "bad_words_ids", [[500]], "bad_words_ids is 500"),
        ("generation_config.json", "bad_words_ids", [[-1]], r"bad_words_ids is \[\[-1\]\]"),
        ("config.json", "activation_function", ["swish"], r"activation_function is \['swish'\]"),
        ("config.json", "scale_embedding", "false", "scale_embedding is 'false'"),
        ("config.json", "tie_word_embeddings", "false", "tie_word_embeddings is 'false'"),
        ("config.json", "encoder_layers", 10**4, "has 10002 layers"),
        ("generation_config.json", "forced_bos_token_id", 7, "forced_bos_token_id is 7"),
        ("generation_config.json", "repetition_penalty", 1.3, "repetition_penalty is 1.3, a setting of the search"),
    ],
)
def test_a_field_that_cannot_be_converted_is_named_with_its_value(folder, tmp_path, file, field, value, match):
    change(folder, file, **{field: value})
    fails(folder, tmp_path, match)


def test_a_model_may_get_the_positions_that_marian_trained_it_with(folder, tmp_path):
    usual = read_marian(folder).config
    assert usual.positions == "sinusoidal_concatenated"
    trained = from_marian(folder, tmp_path / "work", trained_positions=True).config
    assert trained == dataclasses.replace(usual, positions="sinusoidal_tensor2tensor")
    with pytest.raises(
        ValueError, match="is 'sinusoidal_tensor2tensor', but transformers' Marian needs 'sinusoidal' or"
    ):
        to_marian(TrainedModel.load(tmp_path / "work"), tmp_path / "again")


def found_by(path, sentences):
    return [hypotheses[0] for hypotheses in Translator.from_workdir(path).hypotheses(sentences)]


@pytest.mark.slow
def test_limits_and_banned_tokens_of_the_generation_config_are_kept(folder, tmp_path, sentences):
    edit_tensors(folder, lambda tensors: tensors["final_logits_bias"].__setitem__((0, 2), -6.0))  # an improbable end
    from_marian(folder, tmp_path / "before")
    before = found_by(tmp_path / "before", sentences)
    assert max(len(each.ids) for each in before) > 7
    change(folder, "config.json", max_position_embeddings=512)
    change(folder, "generation_config.json", max_length=8)
    after = from_marian(folder, tmp_path / "limited").config
    assert (after.max_length, after.max_output, after.banned_ids) == (512, 7, ())
    assert max(len(each.ids) for each in found_by(tmp_path / "limited", sentences)) == 7
    banned = max({token for each in before for token in each.ids} - {after.eos_id})
    change(folder, "generation_config.json", bad_words_ids=[[0], [banned]])
    after = from_marian(folder, tmp_path / "banned").config
    assert (after.banned_ids, after.suppressed_ids) == ((), (banned,))
    assert banned not in {token for each in found_by(tmp_path / "banned", sentences) for token in each.ids}
    # Exporting gives them back unchanged.
    to_marian(TrainedModel.load(tmp_path / "banned"), tmp_path / "again")
    assert read_marian(tmp_path / "again").config == after


@pytest.mark.slow
@pytest.mark.parametrize("renormalize", [True, False])
def test_banned_tokens_lose_their_probability_with_renormalize_logits(folder, tmp_path, renormalize):
    edit_tensors(folder, lambda tensors: tensors["final_logits_bias"].__setitem__((0, 0), 4.0))
    change(folder, "generation_config.json", renormalize_logits=renormalize)
    model = from_marian(folder, tmp_path / "work")
    assert model.config.banned_ids == ((0, 1) if renormalize else ())
    translator = Translator.from_workdir(tmp_path / "work")
    ((translation,),) = translator.hypotheses(["the cat"], BeamSearch(beam_size=1))
    # Forced decoding gives the same scores as the search.
    (scored,) = translator.score(["the cat"], [translation])
    np.testing.assert_allclose(translation.token_log_probs, scored.token_log_probs, atol=1e-4)
    source, target = (jnp.array([ids]) for ids in (model.vocabularies.source.encode(["the cat"])[0], translation.ids))
    logits = Transformer(model.config).apply({"params": model.params}, source, target, deterministic=True)[0]
    kept = logits[:, 2:] if renormalize else logits
    normalizer = jax.nn.logsumexp(kept, axis=-1)
    expected = jnp.take_along_axis(logits, target[0, :, None], axis=-1)[:, 0] - normalizer
    np.testing.assert_allclose(translation.token_log_probs, expected, atol=1e-4)


def test_harmless_fields_are_ignored(folder):
    plain = read_marian(folder)
    change(folder, "config.json", _attn_implementation_autoset=True, pruned_heads={}, suppress_tokens=[])
    change(folder, "generation_config.json", num_beams=6, length_penalty=0.8, early_stopping=True, max_new_tokens=30)
    assert read_marian(folder).config == dataclasses.replace(plain.config, max_output=30)


def test_each_part_of_a_long_sentence_keeps_its_language(make_model, vocabularies):
    source = vocabularies.source
    pieces = [*source.pieces(range(source.size)), ">>fra<<"]
    vocabulary = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(pieces)})
    model = make_model(pair=VocabularyPair(vocabulary, vocabulary), max_length=12)
    translator = Translator(model)
    search = BeamSearch(beam_size=1, max_length=6)
    with pytest.warns(UserWarning, match="in 2 parts"):
        whole, *parts = translator.translate(
            [
                ">>fra<< the cat runs fast. The dog runs slow.",
                ">>fra<< the cat runs fast.",
                ">>fra<<The dog runs slow.",
            ],
            search,
        )
    assert whole.split() == " ".join(parts).split()
    with pytest.warns(
        UserWarning, match="a sentence does not name the one that is wanted: give target_language, or begin each with "
    ):
        translator.translate([">>fra<< the cat", "the cat", ""], search)
    with pytest.raises(ValueError, match="knows no language >>deu<<"):
        translator.translate(["the cat", ">>deu<< the cat"], search)


def test_special_ids_that_differ_from_the_vocabulary_are_an_error(folder, tmp_path):
    for file in ("config.json", "generation_config.json"):
        change(folder, file, pad_token_id=4)
    fails(folder, tmp_path, "pad_token_id is 4, but in the source vocabulary it is 0")
