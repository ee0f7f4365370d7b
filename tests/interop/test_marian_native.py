import dataclasses
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.marian import from_marian, read_marian
from flax_transformer.interop.marian_native import to_marian_native
from flax_transformer.interop.marian_shortlist import write_shortlist
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel
from tests.interop.conftest import fails, same_tree
from tests.interop.marian_reference import (
    BEFORE,
    OPTIONS,
    forward,
    pieces_model,
    random_tensors,
    sentence,
    write_bin,
    write_npz,
)

LINES = [sentence(number, 2 + number % 9) for number in range(24)]
KINDS = {
    "after, all tied, swish": {},
    "before, tied, gelu": {
        **BEFORE,
        "transformer-ffn-activation": "gelu",
        "tied-embeddings": True,
        "tied-embeddings-all": False,
    },
    "after, untied, relu, unequal": {
        "tied-embeddings-all": False,
        "dim-vocabs": [60, 52],
        "enc-depth": 3,
        "dec-depth": 1,
        "transformer-ffn-activation": "relu",
    },
    "before, sources tied, no bias": {
        **BEFORE,
        "tied-embeddings-all": False,
        "tied-embeddings-src": True,
        "output-omit-bias": True,
    },
    "after, recurrent": {"transformer-decoder-autoreg": "rnn", "dec-cell": "ssru"},
    "before, recurrent": {**BEFORE, "transformer-decoder-autoreg": "rnn", "dec-cell": "ssru"},
}


@pytest.fixture(scope="module")
def vocabularies():
    """The bytes of three SentencePiece models by their sizes and directions."""
    return {"60": pieces_model(60), "52": pieces_model(52, reverse=True)}


def vocab_names(options):
    return [f"vocab.{size}.spm" for size in options["dim-vocabs"]]


def make(folder, vocabularies, changes=None, write=write_npz, name="model.npz", seed=0):
    """A folder with a model as Marian writes it, its tensors, and its options."""
    options = OPTIONS | (changes or {})
    tensors = random_tensors(options, seed)
    folder.mkdir()
    write(folder / name, tensors, options)
    files = vocab_names(options)
    for file in files:
        (folder / file).write_bytes(vocabularies[file.split(".")[1]])
    (folder / "decoder.yml").write_text(
        f"relative-paths: true\nmodels:\n  - {name}\nvocabs:\n  - {files[0]}\n  - {files[1]}\nbeam-size: 6\n"
    )
    return folder, tensors, options


FURTHER = {"before, sources tied, no bias", "after, recurrent"}  # left to `make test-slow`


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow) if kind in FURTHER else kind for kind in KINDS],
)
def converted(request, vocabularies, tmp_path_factory):
    """The folder of a model, its tensors, its options, and the work directory made of it."""
    path = tmp_path_factory.mktemp("marian")
    made = make(path / "downloaded", vocabularies, KINDS[request.param], seed=list(KINDS).index(request.param))
    from_marian(path / "downloaded", path / "work")
    return *made, path / "work"


def compute(model, source, target):
    """Our memory and logits of one sentence pair."""
    module, variables = Transformer(model.config), {"params": model.params}
    arguments = jnp.array([source]), jnp.array([target])
    memory = module.apply(variables, arguments[0], deterministic=True, method="encode")
    return np.asarray(memory[0]), np.asarray(module.apply(variables, *arguments, deterministic=True)[0])


def test_encoder_outputs_and_logits_equal_those_of_a_pass_in_float64(converted):
    _, tensors, options, path = converted
    model = TrainedModel.load(path)
    (source,), (target,) = model.vocabularies.source.encode(LINES[3:4]), model.vocabularies.target.encode(LINES[4:5])
    memory, logits = forward(tensors, options, source, target)
    found_memory, found_logits = compute(model, source, target)
    np.testing.assert_allclose(found_memory, memory, atol=1e-5)
    np.testing.assert_allclose(found_logits[:, : options["dim-vocabs"][1]], logits, atol=1e-5)
    # Marian has no padding: it has no probability.
    exact, lengthened = (jax.nn.logsumexp(each, axis=-1) for each in (jnp.asarray(logits), found_logits))
    np.testing.assert_allclose(lengthened, exact, atol=1e-5)


def test_the_ids_are_those_of_marian_and_one_more_for_padding(converted):
    _, _, options, path = converted
    model = TrainedModel.load(path)
    config, padding = model.config, max(options["dim-vocabs"])
    assert (config.eos_id, config.pad_id, config.start_id, config.zero_start) == (0, padding, padding, True)
    assert config.suppressed_ids == (1,) and config.never_chosen == (1, padding)
    for side in (model.vocabularies.source, model.vocabularies.target):
        assert isinstance(side, MarianVocabulary) and side.pieces([0, 1, padding]) == ["</s>", "<unk>", "<pad>"]
        assert side.decode(side.encode(LINES)) == LINES


def test_the_unknown_token_is_never_chosen_but_keeps_its_probability(vocabularies, tmp_path):
    _, tensors, options = make(tmp_path / "downloaded", vocabularies)
    tensors["decoder_ff_logit_out_b"][0, 1] += 5.0
    write_npz(tmp_path / "downloaded" / "model.npz", tensors, options)
    translator = Translator(read_marian(tmp_path / "downloaded"))
    ((translation,),) = translator.hypotheses(LINES[:1], BeamSearch(beam_size=1, max_length=6))
    assert 1 not in translation.ids
    source = translator.vocabularies.source.encode(LINES[:1])[0]
    _, logits = forward(tensors, options, source, list(translation.ids))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert log_probs[:, 1].max() > -1.0
    expected = log_probs[np.arange(len(translation.ids)), list(translation.ids)]
    np.testing.assert_allclose(translation.token_log_probs, expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "closeness"), [("float32", 0.0), ("float16", 1e-3), ("intgemm8", 0.02)])
def test_bin_files_hold_the_same_model_as_npz_files(vocabularies, tmp_path, kind, closeness):
    def write(path, tensors, options):
        write_bin(path, tensors, options, kind)

    make(tmp_path / "whole", vocabularies, BEFORE)
    make(tmp_path / "small", vocabularies, BEFORE, write=write, name="model.bin")
    whole, small = read_marian(tmp_path / "whole"), read_marian(tmp_path / "small" / "model.bin")
    assert whole.config == small.config

    def compare(wanted, found):
        np.testing.assert_allclose(found, wanted, atol=closeness * np.abs(wanted).max())

    jax.tree.map(compare, whole.params, small.params)
    if kind == "intgemm8":  # as coarse as 127 steps must be, and no finer
        kernel = small.params["encoder"]["layers_0"]["feed_forward"]["inner"]["kernel"]
        assert len(np.unique(kernel)) < 255


def test_lists_of_ids_belong_to_the_sentencepiece_models_beside_them(vocabularies, tmp_path):
    """As OPUS-MT's files are."""
    folder, _, _ = make(tmp_path / "downloaded", vocabularies)
    wanted = read_marian(folder)
    pieces = wanted.vocabularies.source.pieces(range(60))
    folder.joinpath("vocab.60.spm").rename(folder / "source.spm")
    shutil.copy(folder / "source.spm", folder / "target.spm")
    folder.joinpath("decoder.yml").unlink()
    lines = [f'"{piece}": {number}\n' for number, piece in enumerate(pieces)]
    (folder / "opus.vocab.yml").write_text("".join(lines[:50] + [f"? {pieces[50]}\n: 50\n"] + lines[51:]))
    found = read_marian(folder)
    assert found.config == wanted.config
    assert found.vocabularies.fingerprint() == wanted.vocabularies.fingerprint()
    (folder / "target.spm").unlink()
    with pytest.raises(ValueError, match=r"lacks target.spm"):
        read_marian(folder)


def test_an_exported_model_imports_as_the_same_model(converted, tmp_path):
    _, tensors, options, path = converted
    model = TrainedModel.load(path)
    to_marian_native(model, tmp_path / "again")
    with zipfile.ZipFile(tmp_path / "again" / "model.npz") as archive:
        assert {member.extra for member in archive.infolist()} == {b""}  # Marian's reader knows no zip64
    with np.load(tmp_path / "again" / "model.npz") as found:
        wanted = {*tensors, "special:model.yml"}
        if options["tied-embeddings-src"]:  # each side gets its own copy
            wanted = wanted - {"Wemb"} | {"encoder_Wemb", "decoder_Wemb"}
        assert set(found) == wanted
        for name in tensors.keys() & set(found):
            np.testing.assert_array_equal(found[name], tensors[name])
    again = read_marian(tmp_path / "again")
    assert again.config == model.config
    same_tree(again.params, model.params)
    for side in ("source", "target"):
        before, after = (getattr(each.vocabularies, side) for each in (model, again))
        assert after.encode(LINES) == before.encode(LINES)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation": "gelu"}, "model.activation is 'gelu'"),
        ({"positions": "sinusoidal"}, "model.positions is 'sinusoidal'"),
        ({"norm_epsilon": 1e-5}, "model.norm_epsilon is 1e-05"),
        ({"zero_start": False}, "model.zero_start is False"),
        ({"banned_ids": (7,)}, "model.banned_ids has 7"),
    ],
)
def test_what_marian_lacks_is_named_and_nothing_is_written(vocabularies, tmp_path, changes, match):
    make(tmp_path / "downloaded", vocabularies)
    model = read_marian(tmp_path / "downloaded")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
    with pytest.raises(ValueError, match=match):
        to_marian_native(model, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["downloaded"]


REFUSED = [
    ({"type": "amun"}, "type is 'amun'"),
    ({"transformer-decoder-autoreg": "average-attention"}, "transformer-decoder-autoreg is 'average-attention'"),
    ({"transformer-decoder-autoreg": "rnn"}, "dec-cell is 'gru', but only ssru"),
    ({"transformer-tied-layers": [1, 1]}, r"transformer-tied-layers is \[1, 1\]"),
    ({"transformer-train-position-embeddings": True}, "transformer-train-position-embeddings is True"),
    ({"transformer-postprocess-emb": "nd"}, "transformer-postprocess-emb is 'n'"),
    ({"transformer-preprocess": "n"}, "transformer-preprocess 'n', transformer-postprocess 'an'"),
    ({"transformer-postprocess": "dar"}, "transformer-postprocess 'ar'"),
    ({"transformer-ffn-depth": 3}, "transformer-ffn-depth is 3"),
    ({"transformer-decoder-dim-ffn": 12}, "transformer-decoder-dim-ffn is 12"),
    ({"transformer-ffn-activation": "tanh"}, "transformer-ffn-activation is 'tanh'"),
    ({"lemma-dim-emb": 4}, "lemma-dim-emb is 4"),
    ({"right-left": True}, "right-left is True"),
    ({"dim-vocabs": [60, 60, 60]}, r"dim-vocabs is \[60, 60, 60\]"),
    ({"transformer-alibi": True}, "transformer-alibi is True, an unknown field"),
    ({"enc-depth": "many"}, "enc-depth is 'many'"),
    ({"enc-depth": 10**6}, "(enc-depth|num_encoder_layers) is 1000000"),
    ({"transformer-dim-ffn": 10**17}, "d_ff is"),
    ({"transformer-heads": 3}, "num_heads = 3"),
    ({"dim-emb": 18}, "does not fit the options in model.npz"),
    ({"dec-depth": 3}, "the tensor decoder_l3_.* is missing"),
    ({"dec-depth": 1}, "the tensor decoder_l2_context_Wk is unknown"),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_an_option_that_cannot_be_converted_is_named_with_its_value(vocabularies, tmp_path, changes, match):
    folder, tensors, _ = make(tmp_path / "downloaded", vocabularies)
    write_npz(folder / "model.npz", tensors, OPTIONS | changes)
    fails(folder, tmp_path, match)


def test_a_vocabulary_of_another_size_is_an_error(vocabularies, tmp_path):
    folder, _, _ = make(tmp_path / "downloaded", vocabularies)
    (folder / "vocab.60.spm").write_bytes(vocabularies["52"])
    fails(folder, tmp_path, "the source vocabulary vocab.60.spm has 52 pieces, but the model model.npz has 60")


def test_names_outside_the_folder_are_refused(vocabularies, tmp_path):
    folder, _, _ = make(tmp_path / "downloaded", vocabularies)
    decoder = (folder / "decoder.yml").read_text()
    for name in ("../vocab.60.spm", "/etc/passwd", "..", ""):
        (folder / "decoder.yml").write_text(decoder.replace("vocab.60.spm", f'"{name}"'))
        fails(folder, tmp_path, "not a file in the same folder: do not trust this folder")


def test_paths_that_marian_wrote_while_training_name_the_files_beside_them(vocabularies, tmp_path):
    folder, _, _ = make(tmp_path / "downloaded", vocabularies)
    decoder = (folder / "decoder.yml").read_text().replace("relative-paths: true", "relative-paths: false")
    (folder / "decoder.yml").unlink()
    (folder / "model.npz.decoder.yml").write_text(
        decoder.replace("model.npz", "training/model.npz").replace("vocab.60.spm", "/data/vocab.60.spm")
    )
    assert read_marian(folder).config.d_model == 16


def test_files_that_are_still_compressed_or_of_another_format_are_an_error_that_names_the_mend(vocabularies, tmp_path):
    folder, _, _ = make(tmp_path / "downloaded", vocabularies)
    for file in list(folder.iterdir()):
        file.rename(folder / f"{file.name}.gz")
    fails(folder, tmp_path, r"has compressed files \(.*model.npz.gz.*\): unpack them, e.g. with gunzip")
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="belongs to a model in transformers' format: give the folder"):
        read_marian(folder / "pytorch_model.bin")


def test_a_shortlist_of_the_smaller_source_vocabulary_fits(vocabularies, tmp_path):
    options = {"dim-vocabs": [52, 60], "tied-embeddings-all": False}
    folder, _, _ = make(tmp_path / "downloaded", vocabularies, options)
    shortlist = Shortlist(3, np.arange(53), np.full(52, 7, "int32"), joint=False)
    write_shortlist(folder / "lex.50.50.enpt.s2t.bin", shortlist)
    found = read_marian(folder).shortlist
    found.check_fits(read_marian(folder).config)
    assert found.allowed([5, 51], 61).tolist() == shortlist.allowed([5, 51], 61).tolist()


def test_a_folder_with_several_models_asks_for_one_of_them(vocabularies, tmp_path):
    folder, _, _ = make(tmp_path / "downloaded", vocabularies)
    shutil.copy(folder / "model.npz", folder / "other.npz")
    assert read_marian(folder).config.d_model == 16  # decoder.yml names one
    (folder / "decoder.yml").unlink()
    fails(folder, tmp_path, r"several models \(model.npz, other.npz\): give the path of one")
    assert read_marian(folder / "other.npz").config.d_model == 16
