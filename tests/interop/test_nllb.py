import dataclasses
import json
import re

import numpy as np
import pytest
from etils import epath

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.ctranslate2 import to_ctranslate2
from flax_transformer.interop.language_codes import M2M100, NLLB
from flax_transformer.interop.nllb import from_nllb, read_nllb, to_nllb
from flax_transformer.interop.stablehlo import to_stablehlo
from flax_transformer.interop.tensor_files import read_tensors
from flax_transformer.trained_model import TrainedModel
from tests.interop.conftest import change, edit_tensors, fails, same_tree
from tests.languages import CONFIG, language_pair

LANGUAGES = {"source_language": "kan_Knda", "target_language": "eng_Latn"}


@pytest.fixture(scope="module")
def model(make_model, vocabularies):
    pair = language_pair(vocabularies.source).speaking(*LANGUAGES.values())
    return make_model(pair=pair, tie_embeddings="three_way", **CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    to_nllb(model, tmp_path / "downloaded")
    return tmp_path / "downloaded"


@pytest.mark.parametrize("tying", ["three_way", "decoder", "none"])
def test_an_exported_model_imports_as_the_same_model(make_model, model, tmp_path, tying):
    model = make_model(pair=model.vocabularies, tie_embeddings=tying, **CONFIG)
    to_nllb(model, tmp_path / "nllb")
    from_nllb(tmp_path / "nllb", tmp_path / "work")
    found = TrainedModel.load(tmp_path / "work")
    same_tree(found.params, model.params)
    limit = model.config.max_length - 1  # that of transformers includes the start token
    assert found.config == dataclasses.replace(model.config, max_output=limit)
    assert found.vocabularies.fingerprint() == model.vocabularies.fingerprint()


def test_ids_follow_from_the_lists_of_languages_where_no_file_has_them(
    model, folder, make_model, vocabularies, tmp_path
):
    """Like the oldest folders of NLLB, and fairseq's order where there is no list either."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"], settings["additional_special_tokens"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_nllb(folder).vocabularies.fingerprint() == model.vocabularies.fingerprint()
    (folder / "special_tokens_map.json").unlink()
    pair = language_pair(vocabularies.source, unused=len(NLLB))  # as many rows as fairseq's list needs
    to_nllb(make_model(pair=pair, tie_embeddings="three_way", **CONFIG), tmp_path / "large")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).write_bytes((tmp_path / "large" / name).read_bytes())
    source = read_nllb(folder).vocabularies.source
    assert source.languages == NLLB and len(NLLB) == 202 and len(M2M100) == 100
    assert source.pieces([min(source.language_ids) - 1, max(source.language_ids) + 1])[1] == "<mask>"


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "missing"])
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "sentencepiece.bpe.model", "model.safetensors"]
)
def test_a_damaged_file_is_an_error_of_one_line(folder, tmp_path, file, damage):
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
        if file == "tokenizer_config.json":  # the lists of languages are elsewhere, too
            assert read_nllb(folder).vocabularies.source.language == ""
            return
    else:
        noise = np.random.default_rng(0).bytes(len(content))
        path.write_bytes({"truncated": content[: len(content) // 2], "noise": noise, "empty": b""}[damage])
    fails(folder, tmp_path, file, from_nllb)


@pytest.mark.parametrize(
    ("file", "fields", "match"),
    [
        ("config.json", {"model_type": "marian"}, "has a model of type marian: convert it with from-marian"),
        ("config.json", {"model_type": "t5"}, "model_type is 't5', but only 'm2m_100'"),
        ("config.json", {"model": {}}, "is a work directory already"),
        ("config.json", {"vocab_size": 10}, "the model has 10 embeddings"),
        ("config.json", {"vocab_size": 10**12}, "vocab_size is 1000000000000: it must be at most"),
        ("config.json", {"vocab_size": 118}, "embed"),
        ("config.json", {"pad_token_id": 0}, "pad_token_id is 0 in config.json and 1 in generation_config.json"),
        ("config.json", {"eos_token_id": [2, 3]}, "eos_token_id is"),
        ("config.json", {"rope_theta": 7}, "rope_theta is 7, an unknown field"),
        ("generation_config.json", {"forced_bos_token_id": 5}, "forced_bos_token_id is 5, which is not a language"),
        ("tokenizer_config.json", {"tokenizer_class": "MBartTokenizer"}, "tokenizer_class is 'MBartTokenizer'"),
        ("tokenizer_config.json", {"legacy_behaviour": "yes"}, "legacy_behaviour is 'yes'"),
        ("tokenizer_config.json", {"src_lang": "deu_Latn"}, "knows no language deu_Latn"),
        ("tokenizer_config.json", {"src_lang": ["kan_Knda"]}, "src_lang or tgt_lang"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"content": "kan_Knda"}}},
            "id 5 is that of 'kan_Knda'",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"-1": {"content": "kan_Knda"}}},
            "the id of 'kan_Knda' is -1",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9999999": {"content": "kan_Knda"}}}, "is 9999999"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added tokens cannot be read"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"115": {"content": ["kan_Knda"]}}}, "not all text"),
    ],
)
def test_fields_that_cannot_be_converted_or_lie_are_named(folder, tmp_path, file, fields, match):
    change(folder, file, **fields)
    fails(folder, tmp_path, match, from_nllb)


def test_an_end_that_is_stored_as_a_list_of_one_is_that_end(folder):
    plain = read_nllb(folder).config
    change(folder, "generation_config.json", eos_token_id=[plain.eos_id], forced_eos_token_id=[plain.eos_id])
    assert read_nllb(folder).config == plain


def test_a_tokenizer_without_its_sentencepiece_model_says_where_to_get_it(folder, tmp_path):
    (folder / "sentencepiece.bpe.model").unlink()
    (folder / "tokenizer.json").write_text("{}")
    fails(folder, tmp_path, "copy that file from the model from which this one was fine-tuned", from_nllb)


def header(folder, edit):
    """Changes the header of the file of weights."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    fields = json.loads(content[8:end])
    edit(fields)
    changed = json.dumps(fields).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[end:])


SHARED = "model.shared.weight"


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"data_offsets": [0, 2**62]}, "damaged"),
        ({"data_offsets": [-4, 4]}, "damaged"),
        ({"data_offsets": [8, 4]}, "damaged"),
        ({"data_offsets": [0]}, "damaged"),
        ({"data_offsets": "ab"}, "damaged"),
        ({"data_offsets": [0.0, 8.0]}, "damaged"),
        ({"shape": [2**31, 2**31, 2**31]}, "damaged"),
        ({"shape": [-1, 16]}, "damaged"),
        ({"shape": [2]}, "damaged"),
        ({"shape": [1] * 40}, "damaged"),
        ({"shape": 7}, "damaged"),
        ({"dtype": "I8"}, "has type I8"),
        ({"dtype": ["F32"]}, "has type"),
        ({"more": 1}, "damaged"),
    ],
)
def test_a_header_whose_numbers_lie_is_an_error_of_one_line(folder, tmp_path, entry, match):
    header(folder, lambda fields: fields[SHARED].update(entry))
    fails(folder, tmp_path, match, from_nllb)


def test_tensors_are_mapped_from_the_file_and_not_copied(folder):
    tensors = read_tensors(epath.Path(folder))
    assert tensors and all(isinstance(tensor, np.memmap) for tensor in tensors.values())


def test_a_tensor_that_these_models_do_not_have_is_named(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update(extra=np.ones(3, "f4")))
    fails(folder, tmp_path, "the tensor extra is unknown", from_nllb)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm": "post"}, "model.norm is 'post', but M2M100 and NLLB have 'pre'"),
        ({"position_offset": 0}, "model.position_offset is 0"),
        ({"output_bias": True}, "model.output_bias is True"),
    ],
)
def test_an_option_that_these_models_lack_is_named(make_model, model, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        to_nllb(make_model(pair=model.vocabularies, **CONFIG | changes), tmp_path / "nllb")
    assert not list(tmp_path.iterdir())


def test_what_other_exports_cannot_express_is_an_error(make_model, vocabularies, model, tmp_path):
    with pytest.raises(ValueError, match="to-nllb writes only models that came from-nllb"):
        to_nllb(make_model(**CONFIG | {"pad_id": 0, "start_id": 1}), tmp_path / "nllb")
    with pytest.raises(ValueError, match="to-stablehlo writes a program that does not know languages"):
        to_stablehlo(model, tmp_path / "programs")
    small = make_model(pair=language_pair(vocabularies.source, "M2M100Tokenizer"), **CONFIG)
    with pytest.raises(ValueError, match="knows the 100 languages of M2M100 alone, and this model has 3"):
        to_nllb(small, tmp_path / "m2m100")
    legacy = make_model(pair=language_pair(vocabularies.source, language_last=True), **CONFIG)
    with pytest.raises(ValueError, match="legacy_behaviour"):
        to_ctranslate2(legacy, tmp_path / "deployed")
    assert not list(tmp_path.iterdir())


def test_the_readme_for_ctranslate2_prints_a_translation_between_languages(model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: `make peers` installs it")
    from flax_transformer.decoding.settings import BeamSearch
    from flax_transformer.decoding.translator import Translator

    to_ctranslate2(model, tmp_path / "exported")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "exported" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    search = BeamSearch(beam_size=4, length_penalty="length", alpha=1.0, stopping="first", max_length=40)
    (ours,) = Translator(model, source_language="eng_Latn").translate(["A dog runs."], search)
    # When the limit cuts an output off, theirs has one more token.
    assert ours and capsys.readouterr().out.startswith(ours)


def test_vocabularies_of_other_kinds_are_removed_where_these_are_saved(model, vocabularies, tmp_path):
    vocabularies.save(tmp_path)
    model.vocabularies.save(tmp_path)
    assert VocabularyPair.load(tmp_path).fingerprint() == model.vocabularies.fingerprint()
    vocabularies.save(tmp_path)
    assert VocabularyPair.load(tmp_path).fingerprint() == vocabularies.fingerprint()
