import contextlib
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from flax_transformer.interop.marian import from_marian, read_marian, to_marian
from tests.interop.conftest import MARIAN, QUERY, edit_tensors, fails, same_tree


@pytest.mark.parametrize("name", ["model.shared.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"])
def test_a_shared_matrix_may_be_stored_under_any_of_its_names(make_model, tmp_path, name):
    model = make_model(tie_embeddings="three_way", **MARIAN)
    to_marian(model, tmp_path / "downloaded")
    edit_tensors(tmp_path / "downloaded", lambda tensors: tensors.update({name: tensors.pop("model.shared.weight")}))
    found = read_marian(tmp_path / "downloaded")
    assert found.config.tie_embeddings == "three_way"
    same_tree(found.params, model.params)


def test_shared_embeddings_that_differ_are_an_error(make_model, tmp_path):
    to_marian(make_model(tie_embeddings="three_way", **MARIAN), tmp_path / "downloaded")
    other = {"model.encoder.embed_tokens.weight": np.ones((110, 16), "f4")}
    edit_tensors(tmp_path / "downloaded", lambda tensors: tensors.update(other))
    fails(tmp_path / "downloaded", tmp_path, "differ, but config.json shares them")


def test_a_separate_output_matrix_is_kept_whatever_the_configuration_says(make_model, tmp_path):
    """Like opus-mt-tc-big (transformers issue 45005)."""
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


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda tensors: tensors.pop(QUERY), f"{QUERY} is missing"),
        (lambda tensors: tensors.pop("model.encoder.embed_tokens.weight"), "embed_tokens.weight is missing"),
        (lambda tensors: tensors.update({QUERY: np.ones((16, 15), "f4")}), rf"{QUERY} does not fit config.json"),
        (lambda tensors: tensors.update(extra=np.ones(3, "f4")), "the tensor extra is unknown"),
        (lambda tensors: tensors.update({QUERY: np.ones((16, 16), "i4")}), "has type I32"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(folder, tmp_path, edit, match):
    edit_tensors(folder, edit)
    fails(folder, tmp_path, match)


def test_a_vocabulary_of_the_wrong_size_is_an_error(folder, tmp_path):
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(dict(list(ids.items())[:-1])))
    fails(folder, tmp_path, "vocabulary has 109 pieces, but config.json says 110")


@pytest.mark.parametrize(
    ("added", "match"),
    [
        (
            {"<ent>": 110, "<date>": 111},
            r"added_tokens.json gives the model 2 more \('<ent>', '<date>'\).*resize_token",
        ),
        ({"<ent>": 110}, r"resized for 2 pieces more than .*resize_token_embeddings\(110\)"),
        (None, r"resized for 2 pieces more than .*resize_token_embeddings\(110\)"),
    ],
)
def test_embeddings_that_were_resized_are_explained(folder, tmp_path, added, match):
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 112, "decoder_vocab_size": 112}
    (folder / "config.json").write_text(json.dumps(config))
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    fails(folder, tmp_path, f"the source vocabulary has 110 pieces, but config.json says 112: .*{match}")


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "vocab.json", "source.spm", "target.spm", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "missing"])
def test_a_damaged_file_is_an_error_of_one_line(folder, tmp_path, file, damage):
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
    fails(folder, tmp_path, file if damage != "missing" or file != "model.safetensors" else "has no weights")


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
        with pytest.raises(ValueError, match="do not trust this folder"):
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


def test_a_pickle_with_code_is_refused_and_does_not_run(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: `make peers` installs it")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "downloaded" / "sprung"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"model.shared.weight": Hostile(str(trap))}, folder / "pytorch_model.bin")
        fails(folder, tmp_path, "contains more than tensors")
        assert not trap.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_bin_file_is_an_error_of_one_line(folder, tmp_path, zipped):
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
            with contextlib.suppress(ValueError):  # only a number may change
                read_marian(folder)
    path.write_bytes(content[: len(content) // 2])
    fails(folder, tmp_path, "is damaged, or contains more than tensors")
    torch.save({name: tensor.int() for name, tensor in state.items()}, path)
    fails(folder, tmp_path, "has type torch.int32")


def test_a_bin_file_without_torch_names_what_to_install(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    fails(folder, tmp_path, "pip install torch")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        from_marian(tmp_path / "nowhere", tmp_path / "work")
