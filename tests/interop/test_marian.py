"""Takes models, written as Marian's and read again, and leaves a verdict: they are the same, and bad files are told."""

import contextlib
import dataclasses
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from flax_transformer.data.vocabulary import MarianVocabulary, VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.marian import from_marian, read_marian, to_marian
from flax_transformer.interop.marian_tensors import concatenate_waves
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel

MARIAN = {"positions": "sinusoidal_concatenated", "output_bias": True}
TYINGS = ["three_way", "decoder", "none"]


def same_tree(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def translate(model, sentences):
    return Translator(model.config, model.params, model.vocabularies).translate(sentences)


@pytest.fixture
def folder(make_model, tmp_path):
    """A model as it is downloaded."""
    to_marian(make_model(**MARIAN), tmp_path / "downloaded")
    return tmp_path / "downloaded"


def change(folder, file, **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def fails(folder, tmp_path, match):
    """Converting must fail with one line, and leave nothing."""
    with pytest.raises(ValueError, match=match) as raised:
        from_marian(folder, tmp_path / "work")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(("tying", "activation"), list(zip(TYINGS, ["relu", "gelu", "swish"], strict=True)))
def test_what_is_written_is_read_as_the_same_model(make_model, tmp_path, sentences, tying, activation):
    model = make_model(tie_embeddings=tying, activation=activation, **MARIAN)
    to_marian(model, tmp_path / "marian")
    found = from_marian(tmp_path / "marian", tmp_path / "work")
    same_tree(found.params, model.params)
    # Theirs counts the start among the tokens of its limit.
    assert dataclasses.replace(found.config, max_output=0) == model.config
    assert found.config.max_output == model.config.max_length - 1
    stored = TrainedModel.load(tmp_path / "work")
    same_tree(stored.params, model.params)
    assert isinstance(stored.vocabularies.source, MarianVocabulary)
    assert stored.vocabularies.source.encode(sentences) == model.vocabularies.source.encode(sentences)
    if tying == "none":
        assert translate(stored, sentences) == translate(model, sentences)


def test_waves_by_turns_become_waves_in_halves_and_nothing_else_changes(make_model):
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
        ({"positions": "learned"}, "model.positions is 'learned'"),
        ({"norm_epsilon": 1e-6}, "model.norm_epsilon is 1e-06"),
    ],
)
def test_what_marian_cannot_express_is_named(make_model, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        to_marian(make_model(**changes), tmp_path / "marian")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_there_already_stays(make_model, folder, tmp_path, what):
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


def test_an_empty_folder_is_filled(folder, tmp_path):
    (tmp_path / "work").mkdir()
    from_marian(folder, tmp_path / "work")
    assert TrainedModel.load(tmp_path / "work").config.positions == "sinusoidal_concatenated"


@pytest.mark.parametrize(
    ("file", "field", "value", "match"),
    [
        ("config.json", "normalize_before", True, "normalize_before is True"),
        ("config.json", "normalize_embedding", True, "normalize_embedding is True"),
        ("config.json", "model_type", "bart", "model_type is 'bart'"),
        ("config.json", "activation_function", "tanh", "activation_function is 'tanh'"),
        ("config.json", "decoder_ffn_dim", 32, "encoder_ffn_dim is 24 and decoder_ffn_dim 32"),
        ("config.json", "rotary_base", 500, "rotary_base is 500"),
        ("config.json", "d_model", "16", "d_model is '16'"),
        ("config.json", "vocab_size", 99, "source vocabulary has 110 pieces, config.json says 99"),
        ("config.json", "pad_token_id", 4, "pad_token_id is 4 in config.json and 0 in generation_config.json"),
        ("generation_config.json", "forced_eos_token_id", 5, "forced_eos_token_id is 5, only eos_token_id = 2"),
        ("generation_config.json", "bad_words_ids", [[3, 4]], r"bad_words_ids is \[\[3, 4\]\]"),
        ("generation_config.json", "bad_words_ids", [[500]], "names 500"),
        ("generation_config.json", "bad_words_ids", [[-1]], r"bad_words_ids is \[\[-1\]\]"),
        ("config.json", "activation_function", ["swish"], r"activation_function is \['swish'\]"),
        ("config.json", "scale_embedding", "false", "scale_embedding is 'false', true or false is needed"),
        ("config.json", "encoder_layers", 10**9, "asks for 1000000002 layers"),
        ("generation_config.json", "forced_bos_token_id", 7, "forced_bos_token_id is 7"),
        ("generation_config.json", "repetition_penalty", 1.3, "repetition_penalty is 1.3"),
    ],
)
def test_a_field_that_cannot_be_converted_is_named_with_its_value(folder, tmp_path, file, field, value, match):
    change(folder, file, **{field: value})
    fails(folder, tmp_path, match)


def found_by(path, sentences):
    return [hypotheses[0] for hypotheses in Translator.from_workdir(path).hypotheses(sentences)]


def test_limits_and_banned_tokens_of_the_generation_config_are_kept(folder, tmp_path, sentences):
    edit_tensors(folder, lambda tensors: tensors["final_logits_bias"].__setitem__((0, 2), -6.0))  # no hurry to end
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
    assert after.banned_ids == (0, banned)
    assert banned not in {token for each in found_by(tmp_path / "banned", sentences) for token in each.ids}
    # They go back as they came.
    to_marian(TrainedModel.load(tmp_path / "banned"), tmp_path / "again")
    assert set(read_marian(tmp_path / "again").config.banned_ids) == {0, 1, banned}
    assert dataclasses.replace(read_marian(tmp_path / "again").config, banned_ids=after.banned_ids) == after


@pytest.mark.parametrize("renormalize", [True, False])
def test_banned_tokens_lose_their_probability_where_that_is_asked_for(folder, tmp_path, renormalize):
    edit_tensors(folder, lambda tensors: tensors["final_logits_bias"].__setitem__((0, 0), 4.0))
    change(folder, "generation_config.json", renormalize_logits=renormalize)
    model = from_marian(folder, tmp_path / "work")
    assert model.config.banned_ids == ((0, 1) if renormalize else ())
    translator = Translator.from_workdir(tmp_path / "work")
    ((translation,),) = translator.hypotheses(["the cat"], BeamSearch(beam_size=1))
    # Whatever a search gives its own, forced decoding gives it too.
    (scored,) = translator.score(["the cat"], [translation])
    np.testing.assert_allclose(translation.token_log_probs, scored.token_log_probs, atol=1e-4)
    source, target = (jnp.array([ids]) for ids in (model.vocabularies.source.encode(["the cat"])[0], translation.ids))
    logits = Transformer(model.config).apply({"params": model.params}, source, target, deterministic=True)[0]
    kept = logits[:, 2:] if renormalize else logits
    normalizer = jax.nn.logsumexp(kept, axis=-1)
    expected = jnp.take_along_axis(logits, target[0, :, None], axis=-1)[:, 0] - normalizer
    np.testing.assert_allclose(translation.token_log_probs, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["model.shared.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"])
def test_of_what_is_shared_any_name_is_enough(make_model, tmp_path, name):
    model = make_model(tie_embeddings="three_way", **MARIAN)
    to_marian(model, tmp_path / "downloaded")
    edit_tensors(tmp_path / "downloaded", lambda tensors: tensors.update({name: tensors.pop("model.shared.weight")}))
    found = read_marian(tmp_path / "downloaded")
    assert found.config.tie_embeddings == "three_way"
    same_tree(found.params, model.params)


def test_embeddings_that_are_said_to_be_shared_and_differ_are_told(make_model, tmp_path):
    to_marian(make_model(tie_embeddings="three_way", **MARIAN), tmp_path / "downloaded")
    other = {"model.encoder.embed_tokens.weight": np.ones((110, 16), "f4")}
    edit_tensors(tmp_path / "downloaded", lambda tensors: tensors.update(other))
    fails(tmp_path / "downloaded", tmp_path, "differ, but config.json shares them")


def test_an_output_of_its_own_is_kept_whatever_the_configuration_says(make_model, tmp_path):
    """As opus-mt-tc-big has it (transformers issue 45005)."""
    model = make_model(tie_embeddings="three_way", **MARIAN)
    to_marian(model, tmp_path / "downloaded")
    output = np.random.default_rng(5).normal(size=(110, 16)).astype("float32")
    edit_tensors(tmp_path / "downloaded", lambda tensors: tensors.update({"lm_head.weight": output}))
    found = read_marian(tmp_path / "downloaded")
    assert found.config.tie_embeddings == "none"
    np.testing.assert_array_equal(found.params["output_kernel"], output.T)
    np.testing.assert_array_equal(
        found.params["source_embedding"]["embedding"], model.params["shared_embedding"]["embedding"]
    )


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_read_as_float32(folder, kind):
    path = folder / "model.safetensors"
    wanted = {
        name: np.asarray(jnp.asarray(tensor, kind), "float32")
        for name, tensor in safetensors.numpy.load(path.read_bytes()).items()
    }
    path.write_bytes(safetensors.flax.save({name: jnp.asarray(tensor, kind) for name, tensor in wanted.items()}))
    found = read_marian(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}
    np.testing.assert_array_equal(
        found.params["decoder"]["layers_1"]["self_attention"]["query"]["kernel"], wanted[QUERY].T
    )


def test_harmless_fields_are_passed_over(folder):
    plain = read_marian(folder)
    change(folder, "config.json", _attn_implementation_autoset=True, pruned_heads={}, suppress_tokens=[])
    change(folder, "generation_config.json", num_beams=6, length_penalty=0.8, early_stopping=True, max_new_tokens=30)
    assert read_marian(folder).config == dataclasses.replace(plain.config, max_output=30)


def pieces_of(vocabulary):
    return vocabulary.pieces(range(vocabulary.size))


def test_ids_come_from_the_list_and_not_from_sentencepiece(make_model, vocabularies, folder, tmp_path, sentences):
    """Ids in the order of a list of Marian's, its end of sentence first and its padding last."""
    source = vocabularies.source
    rest = [piece for piece in pieces_of(source) if piece not in ("<pad>", "<s>", "</s>", "<unk>")]
    order = ["</s>", "<unk>", *reversed(rest), "<pad>"]
    ids = {piece: number for number, piece in enumerate(order)}
    vocabulary = MarianVocabulary(source.to_bytes(), ids)
    assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (
        len(ids) - 1,
        len(ids) - 1,
        0,
        1,
    )
    rows = vocabulary.encode([*sentences, "the ☃"])
    assert [vocabulary.pieces(row) for row in rows[:-1]] == [source.pieces(row) for row in source.encode(sentences)]
    assert 1 in rows[-1] and vocabulary.decode(rows[:-1]) == sentences
    assert vocabulary.decode([[*row, vocabulary.pad_id, 5] for row in rows[:-1]]) == sentences
    assert pickle.loads(pickle.dumps(vocabulary)).to_bytes() == vocabulary.to_bytes()
    pair = VocabularyPair(vocabulary, MarianVocabulary(source.to_bytes(), {**ids, "cat!": len(ids)}))
    pair.save(tmp_path / "pair")
    loaded = VocabularyPair.load(tmp_path / "pair")
    assert loaded.fingerprint() == pair.fingerprint() and loaded.target.size == pair.target.size
    assert VocabularyPair.is_in(tmp_path / "pair") and not VocabularyPair.is_in(tmp_path)


def test_a_language_token_is_one_token_and_an_unknown_one_an_error(vocabularies):
    source = vocabularies.source
    pieces = [*pieces_of(source), ">>fra<<", ">>kan<<"]
    vocabulary = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(pieces)})
    assert vocabulary.languages == (">>fra<<", ">>kan<<")
    (plain, french) = vocabulary.encode(["the cat", ">>fra<< the cat"])
    assert french == [len(pieces) - 2, *plain]
    assert vocabulary.split_language(">>fra<< the cat") == (">>fra<<", " the cat")
    with pytest.raises(ValueError, match=r'>>deu<< \(">>deu<< the cat"\): begin with one of >>fra<<, >>kan<<'):
        vocabulary.split_language(">>deu<< the cat")
    # A target, or a sentence of a model without such tokens, is text like any other.
    assert len(vocabulary.encode([">>deu<< the cat"])[0]) > len(french)
    without = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(pieces[:-2])})
    assert without.split_language(">>deu<< the cat") == ("", ">>deu<< the cat")


def test_each_part_of_a_long_sentence_keeps_its_language(make_model, vocabularies):
    source = vocabularies.source
    pieces = [*pieces_of(source), ">>fra<<"]
    vocabulary = MarianVocabulary(source.to_bytes(), {piece: number for number, piece in enumerate(pieces)})
    model = make_model(pair=VocabularyPair(vocabulary, vocabulary), max_length=12)
    translator = Translator(model.config, model.params, model.vocabularies)
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
    with pytest.raises(ValueError, match="knows no language >>deu<<"):
        translator.translate(["the cat", ">>deu<< the cat"], search)


def test_a_piece_that_only_the_source_has_is_spelled_with_its_space(vocabularies):
    source = vocabularies.source
    ids = {piece: number for number, piece in enumerate([*pieces_of(source), "▁elephant"])}
    vocabulary = MarianVocabulary(source.to_bytes(), ids)
    (row,) = vocabulary.encode(["the cat"])
    assert vocabulary.decode([[*row[:-1], ids["▁elephant"], row[0]]]) == ["the cat elephant the"]


def test_ids_that_are_those_of_another_vocabulary_are_told(folder, tmp_path):
    for file in ("config.json", "generation_config.json"):
        change(folder, file, pad_token_id=4)
    fails(folder, tmp_path, "pad_token_id is 4, the source vocabulary has 0")


@pytest.mark.parametrize("ids", [{"<pad>": 0, "</s>": 1, "<unk>": 1}, {"<pad>": 0, "</s>": 2, "<unk>": 3}])
def test_a_list_that_skips_or_doubles_an_id_is_refused(vocabularies, ids):
    with pytest.raises(ValueError, match="give each an id, and no id twice"):
        MarianVocabulary(vocabularies.source.to_bytes(), ids)


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    edit(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))


QUERY = "model.decoder.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda tensors: tensors.pop(QUERY), f"{QUERY} is missing"),
        (lambda tensors: tensors.pop("model.encoder.embed_tokens.weight"), "embed_tokens.weight is missing"),
        (lambda tensors: tensors.update({QUERY: np.ones((16, 15), "f4")}), rf"{QUERY} does not fit config.json"),
        (lambda tensors: tensors.update(extra=np.ones(3, "f4")), "tensor extra belongs to no Marian model"),
        (lambda tensors: tensors.update({QUERY: np.ones((16, 16), "i4")}), "holds I32"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(folder, tmp_path, edit, match):
    edit_tensors(folder, edit)
    fails(folder, tmp_path, match)


def test_a_vocabulary_of_another_size_is_told(folder, tmp_path):
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(dict(list(ids.items())[:-1])))
    fails(folder, tmp_path, "vocabulary has 109 pieces, config.json says 110")


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "vocab.json", "source.spm", "target.spm", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "missing"])
def test_a_damaged_file_is_one_line(folder, tmp_path, file, damage):
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
        if file == "generation_config.json":  # not every model has one
            assert read_marian(folder).config.max_length == 40
            return
    else:
        noise = np.random.default_rng(0).bytes(len(content))
        path.write_bytes({"truncated": content[: len(content) // 2], "noise": noise, "empty": b""}[damage])
    fails(folder, tmp_path, file if damage != "missing" or file != "model.safetensors" else "holds no weights")


def test_shards_are_read_and_a_path_outside_the_folder_is_not(folder, tmp_path):
    whole = read_marian(folder)
    tensors = safetensors.numpy.load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, inside in shards.items():
        (folder / file).write_bytes(safetensors.numpy.save({name: tensors[name] for name in inside}))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, inside in shards.items() for name in inside}}))
    same_tree(read_marian(folder).params, whole.params)
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", "", 5):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, outside)}))
        with pytest.raises(ValueError, match="no file beside it"):
            read_marian(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "c.safetensors")}))
    with pytest.raises(ValueError, match="lacks c.safetensors"):
        read_marian(folder)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: `make peers` installs it")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "downloaded" / "sprung"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"model.shared.weight": Hostile(str(trap))}, folder / "pytorch_model.bin")
        fails(folder, tmp_path, "holds more than tensors")
        assert not trap.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_bin_file_is_one_line(folder, tmp_path, zipped):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: `make peers` installs it")
    tensors = safetensors.numpy.load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert read_marian(folder).config.max_length == 40
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        cut = content[: rng.integers(len(content))]
        place = int(rng.integers(min(len(content), 4000)))
        for damaged in (cut, content[:place] + rng.bytes(16) + content[place + 16 :]):
            path.write_bytes(damaged)
            with contextlib.suppress(ValueError):  # a number may be another one, and nothing else may happen
                read_marian(folder)
    path.write_bytes(content[: len(content) // 2])
    fails(folder, tmp_path, "is damaged, or holds more than tensors")
    torch.save({name: tensor.int() for name, tensor in state.items()}, path)
    fails(folder, tmp_path, "holds torch.int32, not floating-point")


def test_a_bin_file_without_torch_names_what_to_install(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    fails(folder, tmp_path, "pip install torch")


def test_a_folder_that_is_none_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        from_marian(tmp_path / "nowhere", tmp_path / "work")
