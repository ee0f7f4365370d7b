"""Takes a small random Transformer and a vocabulary and leaves a verdict: searching and translating do as they say.

What an untrained model says means nothing, but it depends on every token of the source, so whatever is mixed up shows.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.translator import EXTRA_LENGTH, SMALLEST_BUCKET, Translator, search_translations
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.model import Transformer
from flax_transformer.workdir import WorkDirectory

V, EOS = 12, 2
WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()
SOURCE = np.array([[4, 9, 5, 2, 0, 0, 0], [6, 3, 7, 8, 10, 11, 2], [5, 2, 0, 0, 0, 0, 0]], "int32")
LIMITS = np.array([9, 6, 8], "int32")
LONGEST = 9


def small_config(size):
    return TransformerConfig(
        source_vocab_size=size,
        target_vocab_size=size,
        d_model=16,
        num_heads=2,
        d_ff=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        tie_embeddings="none",  # or whatever was said last would be said again
    )


def random_params(config, seed):
    """Matrices large enough that the model is sure of itself, and that its outputs differ from source to source."""
    tokens, rng = jnp.ones((1, 2), jnp.int32), np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(Transformer(config).init, deterministic=True), jax.random.key(0), tokens, tokens)

    def fill(path, leaf):
        constants = {"scale": np.ones, "bias": np.zeros}
        return jnp.asarray(constants.get(path[-1].key, partial(rng.normal, 0.0, 0.7))(leaf.shape), "float32")

    return jax.tree_util.tree_map_with_path(fill, shapes["params"])


@pytest.fixture(scope="module")
def model():
    config = small_config(V)
    return config, random_params(config, 290)  # One whose outputs end at their limits, and before them.


@pytest.fixture(scope="module")
def parallel(model):
    """The log-probabilities [B, T, V] of one pass over whole targets, in which every token is a word like any other."""
    config, params = model
    apply = jax.jit(partial(Transformer(config).apply, deterministic=True))

    def log_probs(target):
        segments = np.ones_like(target)
        return np.asarray(jax.nn.log_softmax(apply({"params": params}, SOURCE, target, target_segments=segments)))

    return log_probs


def search(model, source=SOURCE, limits=LIMITS, *, beam_size, max_length=LONGEST):
    config, params = model
    options = {"config": config, "beam_size": beam_size, "alpha": 0.6, "max_length": max_length}
    return jax.device_get(vars(search_translations(params, jnp.array(source), jnp.array(limits), **options)))


def test_greedy_search_equals_a_loop_that_runs_the_whole_model_at_each_step(model, parallel):
    target, lengths = np.zeros((len(SOURCE), LONGEST), "int32"), np.zeros(len(SOURCE), int)
    for step in range(LONGEST):
        best = parallel(target)[:, step].argmax(-1)
        best = np.where(step + 1 >= LIMITS, EOS, best)
        target[:, step] = np.where(lengths == 0, best, 0)
        lengths = np.where((lengths == 0) & (best == EOS), step + 1, lengths)
    assert (lengths < LIMITS).any() and (lengths == LIMITS).any()
    found = search(model, beam_size=1)
    assert np.array_equal(found["lengths"][:, 0], lengths)
    assert np.array_equal(found["tokens"][:, 0], target)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_log_probabilities_are_those_of_one_parallel_pass(model, parallel, beam_size):
    found = search(model, beam_size=beam_size)
    tokens, lengths = found["tokens"][:, 0], found["lengths"]
    each = np.take_along_axis(parallel(tokens), tokens[..., None], axis=-1)[..., 0]
    expected = np.where(np.arange(LONGEST) < lengths, each, 0).sum(-1)
    np.testing.assert_allclose(found["log_probs"][:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(found["scores"], expected[:, None] / ((5 + lengths) / 6) ** 0.6, atol=1e-5)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_padding_and_neighbours_do_not_change_a_sentences_result(model, beam_size):
    together = search(model, beam_size=beam_size)
    assert SOURCE[0].tolist() == [4, 9, 5, 2, 0, 0, 0]
    alone = search(model, SOURCE[:1, :4], LIMITS[:1], beam_size=beam_size, max_length=LONGEST + 2)
    assert np.array_equal(alone["tokens"][0, :, :LONGEST], together["tokens"][0])
    np.testing.assert_allclose(alone["scores"][0], together["scores"][0], atol=1e-5)


SENTENCES = [
    " ".join(np.random.default_rng(number).choice(WORDS, length))
    for number, length in enumerate([3, 9, 1, 14, 2, 5, 4, 11, 6, 3, 3, 8])
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two checkpoints: step 1 has the better BLEU, step 2 the better loss, and BLEU is what training chose by."""
    lines = [" ".join(np.random.default_rng(100 + number).choice(WORDS, 6)) for number in range(40)]
    vocabularies = VocabularyPair.train(lines, lines, VocabularyConfig(size=110))
    config = small_config(vocabularies.source.size)
    workdir = WorkDirectory(tmp_path_factory.mktemp("work") / "run")
    workdir.write_config({"model": dataclasses.asdict(config), "training": {"best_metric": "bleu"}})
    workdir.write_vocabularies(vocabularies)
    with workdir.open_checkpoints() as checkpoints:
        for step, metrics in ((1, {"bleu": 9.0, "loss": 3.0}), (2, {"bleu": 8.0, "loss": 2.0})):
            checkpoints.save(step, random_params(config, 2 + step), {"count": jnp.array(step)}, {}, metrics)
    return workdir


@pytest.fixture(scope="module")
def translator(workdir):
    return Translator.from_workdir(workdir.path)


@pytest.fixture(scope="module")
def first_run(translator):
    """The sentences' translations, and how many programs they took."""
    before = search_translations._cache_size()
    return translator.translate(SENTENCES, beam_size=1), search_translations._cache_size() - before


@pytest.fixture(scope="module")
def translations(first_run):
    return first_run[0]


def test_every_line_has_one_line_and_each_its_own(translations):
    assert len(translations) == len(SENTENCES)
    assert len(set(translations)) == len(set(SENTENCES))
    assert all(translation and "\n" not in translation for translation in translations)


def test_translations_come_in_the_order_of_their_sentences(translator, translations):
    order = np.random.default_rng(0).permutation(len(SENTENCES))
    shuffled = translator.translate([SENTENCES[number] for number in order], beam_size=1)
    assert shuffled == [translations[number] for number in order]


def test_empty_and_blank_lines_stay_empty_among_the_others(translator, translations):
    blank = ["", " ", "\t", "\u3000 "]
    lines = [line for sentence in SENTENCES for line in (*blank, sentence)]
    expected = [line for translation in translations for line in (*[""] * len(blank), translation)]
    assert translator.translate(lines, beam_size=1) == expected
    assert translator.translate(["", " "]) == ["", ""]
    assert translator.translate([]) == []


def test_where_a_batch_ends_changes_no_translation(workdir, translations):
    tight = Translator.from_workdir(workdir.path, batch_tokens=4 * SMALLEST_BUCKET)
    short = {line: translation for line, translation in zip(SENTENCES, translations, strict=True) if len(line) < 20}
    assert len(short) > 4 and len(short) % 4  # more than one batch, and the last one not full
    assert tight.translate(list(short), beam_size=1) == list(short.values())


def test_beam_search_is_the_default_and_does_not_depend_on_neighbours(translator):
    lines = ["the cat", "a dog sat", "red mouse", "up"]
    together = translator.translate(lines)
    assert together == translator.translate(lines, beam_size=4, alpha=0.6)
    assert together[1:] == translator.translate(lines[1:])  # in a batch that is not full
    assert together[::-1] == translator.translate(lines[::-1])


def test_a_text_of_many_lengths_compiles_one_program_a_bucket(translator, first_run):
    lengths = {len(ids) for ids in translator.vocabularies.source.encode(SENTENCES)}
    buckets = {max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()) for length in lengths}
    assert len(lengths) > 2 * len(buckets)
    assert 1 <= first_run[1] <= len(buckets)


def test_a_translation_is_at_most_fifty_tokens_longer_than_its_source(translator, monkeypatch):
    longer = []

    def watch(params, source, limits, **options):
        hypotheses = search_translations(params, source, limits, **options)
        longer.extend((hypotheses.lengths[:, 0] - (source != 0).sum(1))[source.any(1)].tolist())
        return hypotheses

    monkeypatch.setattr("flax_transformer.decoding.translator.search_translations", watch)
    translator.translate(SENTENCES, beam_size=1)
    assert len(longer) == len(SENTENCES)
    assert max(longer) == EXTRA_LENGTH == 50  # section 6.1


def test_learned_positions_bound_the_output_and_a_longer_source_is_an_error_that_names_the_mend(translator):
    config = dataclasses.replace(translator.config, positions="learned", max_length=6)
    learned = Translator(config, random_params(config, 0), translator.vocabularies)
    assert learned.translate(["the cat"], beam_size=1)[0]
    with pytest.raises(ValueError, match=r"^.*8 positions, model.max_length is 6: raise it.*$"):
        learned.translate(["the cat sat on the red mouse"], beam_size=1)


def test_the_best_checkpoint_is_the_best_by_the_metric_that_training_chose_by(workdir, translations):
    def translate(step):
        return Translator.from_workdir(workdir.path, step=step).translate(SENTENCES, beam_size=1)

    assert translate("best") == translate(1) == translations
    assert translate("latest") == translate(2) != translations


def test_loading_leaves_a_running_trainings_folder_as_it_is(workdir):
    under_way = workdir.path / "checkpoints" / "3.orbax-checkpoint-tmp"
    under_way.mkdir()
    Translator.from_workdir(workdir.path)
    assert under_way.exists()
    under_way.rmdir()


def without(workdir, folder, *names):
    """A copy of a work directory that lacks something."""
    for path in workdir.path.iterdir():
        if path.name not in names:
            (folder / path.name).symlink_to(path)
    return folder


def test_a_folder_without_a_config_is_an_error_that_names_the_mend(workdir, tmp_path):
    with pytest.raises(ValueError, match=r"^.*is not a work directory, config.json is missing: give .*--workdir$"):
        Translator.from_workdir(without(workdir, tmp_path, "config.json"))


def test_a_folder_without_a_checkpoint_is_an_error_and_stays_without(workdir, tmp_path):
    with pytest.raises(ValueError, match=r"^.* holds no checkpoint: train until one is written.*$"):
        Translator.from_workdir(without(workdir, tmp_path, "checkpoints"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", [3, "newest"])
def test_a_checkpoint_that_is_not_there_is_an_error_that_names_those_that_are(workdir, step):
    with pytest.raises(ValueError, match=rf"^.* holds no checkpoint {step!r}: choose best, latest or one of \[1, 2\]$"):
        Translator.from_workdir(workdir.path, step=step)
