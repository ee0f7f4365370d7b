"""Compares searches in slots with whole passes through the model, which need no cache, and with each sentence alone."""

import itertools
from functools import cache, partial

import jax
import numpy as np
import pytest

from flax_transformer.decoding.moving import move
from flax_transformer.decoding.scoring import align_targets, score_targets
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.slots import Size, Tenants, advance, empty_slots, encode
from flax_transformer.model import Transformer
from flax_transformer.tokens import Tokens

V, PAD, START, EOS = 12, 0, 1, 2
SOURCE = np.array([[4, 9, 5, 2, 0, 0, 0], [6, 3, 7, 8, 10, 11, 2], [5, 2, 0, 0, 0, 0, 0]], "int32")
LIMITS = np.array([9, 6, 2], "int32")
LONGEST = 9
SPECIAL = (PAD, START)  # what no output holds
GREEDY = BeamSearch(beam_size=1, banned=SPECIAL)
BEAM = BeamSearch(beam_size=4, num_return=3, banned=SPECIAL)
SAMPLING = Sampling(num_return=3, banned=SPECIAL)
every_search = pytest.mark.parametrize("settings", [GREEDY, BEAM, SAMPLING], ids=["greedy", "beam", "sampling"])


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(V, 290)  # One whose outputs end at their limits, and before them.


@pytest.fixture(scope="module")
def ensemble(make_model, model):
    """Two models that differ in size too; the decoder of the second is recurrent."""
    return model, make_model(V, 309, d_model=8, num_decoder_layers=2, decoder_autoregression="ssru")


def split(models):
    """The configs and the parameters."""
    return tuple(config for config, _ in models), tuple(params for _, params in models)


def keys(settings, count=3):
    return jax.random.split(jax.random.key(0), 3)[:count] if isinstance(settings, Sampling) else None


ONE = jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("batch",))
FOREVER = np.int32(10**6)


class Slots:
    """Slots for sentences with the same settings, and what a host would do with them, each source in a row of its own.

    `take` puts sentences into slots, `advance` moves them on.
    """

    def __init__(self, models, settings, size, mesh=ONE):
        self.configs, self.models = split(models)
        self.settings, self.size, self.mesh = settings, Size(*size), mesh
        self.options = {"configs": self.configs, "settings": settings, "mesh": mesh}
        self.progress = empty_slots(size=self.size, **self.options)
        slots = self.size.slots
        self.limits, self.num_return = np.ones(slots, "int32"), np.full(slots, settings.num_return, "int32")
        self.prefix = np.zeros((slots, self.size.target), "int32")
        self.rngs = np.zeros((slots, 2), "uint32") if isinstance(settings, Sampling) else None
        self.active = np.zeros(slots, bool)
        self.sources = {}

    def take(self, slot, source, limit, prefix=(), rng=None):
        self.sources[slot] = [token for token in source if token != PAD]
        self.limits[slot], self.active[slot] = limit, True
        self.prefix[slot] = [*prefix, *[PAD] * (self.size.target - len(prefix))]
        if rng is not None:
            self.rngs[slot] = jax.random.key_data(rng)

    def advance(self, steps=FOREVER, enough=FOREVER):
        slots, devices = self.size.slots, self.mesh.size
        ids = np.zeros((slots, self.size.source), "int32")
        row, start, length, arrivals = np.zeros((4, slots), "int32")
        count, is_new = np.zeros(devices, "int32"), np.zeros(slots, bool)
        for slot, source in self.sources.items():
            device, own = divmod(slot, slots // devices)
            row[slot], start[slot], length[slot], is_new[slot] = slot, slot % 2, len(source), True
            start[slot] = min(start[slot], self.size.source - len(source))
            ids[slot, start[slot] : start[slot] + len(source)] = source
            arrivals[device * (slots // devices) + count[device]] = own
            count[device] += 1
        self.sources = {}
        tokens = Tokens.from_segments(ids, (ids != PAD).astype("int32"))
        used = np.full(devices, slots // devices, "int32")
        pool = encode(self.models, tokens, used, configs=self.configs, mesh=self.mesh)
        tenants = Tenants(
            given=np.zeros(slots, np.int32),
            active=self.active.copy(),
            limits=self.limits.copy(),
            num_return=self.num_return,
            prefix=self.prefix.copy(),
            rngs=None if self.rngs is None else self.rngs.copy(),
            is_new=is_new,
            arrivals=arrivals,
            count=count,
            row=row,
            start=start,
            length=length,
        )
        steps, enough = np.int32(steps), np.int32(enough)
        self.progress, outcome = advance(self.models, self.progress, pool, tenants, steps, enough, **self.options)
        found = {**jax.device_get(vars(outcome.hypotheses)), "open": np.asarray(outcome.is_open)}
        return found, np.asarray(outcome.step)


def search(*models, source=SOURCE, limits=LIMITS, settings, max_length=LONGEST, rngs=None, prefix=None, mesh=ONE):
    """What is found when all sentences begin together, each in a slot of its own."""
    slots = Slots(models, settings, (len(source), source.shape[1], max_length), mesh)
    rngs = keys(settings, len(source)) if rngs is None else rngs
    for slot, row in enumerate(source):
        wish = [] if prefix is None else [token for token in prefix[slot] if token != PAD]
        slots.take(slot, row, limits[slot], wish, None if rngs is None else rngs[slot])
    return slots.advance()[0]


def log_probs_of(model, target, source=SOURCE):
    """Log-probabilities [B, T, V] of one pass over whole targets, in which every token is a word like any other."""
    config, params = model
    words = Tokens.from_segments(target, np.ones_like(target))
    return jax.nn.log_softmax(whole_pass(config)({"params": params}, source, words))


@cache
def whole_pass(config):
    return jax.jit(partial(Transformer(config).apply, deterministic=True))


def mean_log_probs(models, target):
    """Of the mean of the models' probabilities, by hand."""
    return np.log(np.mean([np.exp(np.float64(log_probs_of(model, target))) for model in models], axis=0))


def check_log_probs(found, models, atol=1e-4):
    """Each token's log-probability is that of whole passes, and they sum to the outputs'."""
    lengths, each = found["lengths"], found["token_log_probs"]
    assert (lengths > 0).all() and (lengths <= LIMITS[:, None]).all()
    for rank in range(lengths.shape[1]):
        tokens = found["tokens"][:, rank]
        expected = np.take_along_axis(mean_log_probs(models, tokens), tokens[..., None], axis=-1)[..., 0]
        there = np.arange(tokens.shape[1]) < lengths[:, rank, None]
        np.testing.assert_allclose(each[:, rank], np.where(there, expected, 0), atol=atol)
        assert (tokens[~there] == PAD).all() and (tokens == EOS).sum(1).tolist() == [1] * len(tokens)
    np.testing.assert_allclose(found["log_probs"], each.sum(-1), atol=atol)


def test_greedy_search_equals_a_loop_that_runs_the_whole_model_at_each_step(model):
    target, lengths = np.zeros((len(SOURCE), LONGEST), "int32"), np.zeros(len(SOURCE), int)
    for step in range(LONGEST):
        log_probs = np.array(log_probs_of(model, target))[:, step]
        log_probs[:, SPECIAL] = -np.inf
        best = log_probs.argmax(-1)
        best = np.where(step + 1 >= LIMITS, EOS, best)
        target[:, step] = np.where(lengths == 0, best, 0)
        lengths = np.where((lengths == 0) & (best == EOS), step + 1, lengths)
    assert (lengths == LIMITS).any()
    found = search(model, settings=GREEDY)
    assert np.array_equal(found["lengths"][:, 0], lengths)
    assert np.array_equal(found["tokens"][:, 0], target)


@every_search
def test_log_probabilities_are_those_of_whole_passes(model, settings):
    found = search(model, settings=settings)
    check_log_probs(found, [model])
    expected = found["log_probs"] / settings.penalty(found["lengths"])
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5)
    assert (found["lengths"][2] == LIMITS[2]).any()  # an end that was forced counts like any other


@every_search
def test_an_ensemble_has_the_logarithm_of_the_mean_of_the_probabilities(ensemble, settings):
    check_log_probs(search(*ensemble, settings=settings), ensemble)


def test_an_ensemble_chooses_what_the_mean_of_the_probabilities_chooses(ensemble):
    found = search(*ensemble, settings=GREEDY)
    tokens = found["tokens"][:, 0]
    log_probs = mean_log_probs(ensemble, tokens)
    log_probs[..., SPECIAL] = -np.inf
    best = log_probs.argmax(-1)
    chosen = np.arange(LONGEST) < np.minimum(found["lengths"], LIMITS[:, None] - 1)
    assert np.array_equal(tokens[chosen], best[chosen])
    for model in ensemble:
        assert not np.array_equal(tokens, search(model, settings=GREEDY)["tokens"][:, 0])


@pytest.mark.parametrize("alpha", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_beam_over_every_output_of_a_recurrent_decoder_equals_exhaustive_search(make_model, alpha):
    model = make_model(V, 292, num_decoder_layers=2, decoder_autoregression="ssru")
    words, longest = [token for token in range(V) if token not in (*SPECIAL, EOS)], 3
    every = [(*begun, EOS) for size in range(longest) for begun in itertools.product(words, repeat=size)]
    settings = BeamSearch(beam_size=len(words) ** 2, num_return=20, banned=SPECIAL, alpha=alpha)
    found = search(model, settings=settings, limits=[longest] * 3, max_length=longest)
    targets = np.array([[*output, *[PAD] * (longest - len(output))] for output in every], "int32")
    lengths = np.array([len(output) for output in every])
    for sentence, source in enumerate(SOURCE):
        log_probs = np.float64(log_probs_of(model, targets, np.tile(source, (len(every), 1))))
        each = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        scores = np.where(targets == PAD, 0, each).sum(1) / settings.penalty(lengths)
        best = np.argsort(-scores)[:20]
        np.testing.assert_allclose(found["scores"][sentence], scores[best], atol=1e-5)
        assert np.array_equal(found["tokens"][sentence], targets[best])


def test_an_ensemble_of_a_model_and_itself_is_the_model(model):
    twice, once = search(model, model, settings=BEAM), search(model, settings=BEAM)
    assert np.array_equal(twice["tokens"], once["tokens"])
    np.testing.assert_allclose(twice["token_log_probs"], once["token_log_probs"], atol=1e-5)


@every_search
def test_scoring_what_was_found_gives_the_numbers_that_the_search_gave(ensemble, settings):
    configs, params = split(ensemble)
    found = search(*ensemble, settings=settings)
    for rank in range(settings.num_return):
        scored = score_targets(params, SOURCE, found["tokens"][:, rank], configs=configs, mesh=ONE)
        np.testing.assert_allclose(scored, found["token_log_probs"][:, rank], atol=1e-4)


@pytest.mark.parametrize("settings", [BEAM, SAMPLING], ids=["beam", "sampling"])
def test_padding_neighbours_and_room_do_not_change_a_sentences_result(model, settings):
    together = search(model, settings=settings)
    assert SOURCE[0].tolist() == [4, 9, 5, 2, 0, 0, 0]
    short = {"source": SOURCE[:1, :4], "limits": LIMITS[:1], "rngs": keys(settings, 1)}
    alone = search(model, settings=settings, max_length=LONGEST + 2, **short)
    assert np.array_equal(alone["tokens"][0, :, :LONGEST], together["tokens"][0])
    np.testing.assert_allclose(alone["scores"][0], together["scores"][0], atol=1e-5)


def test_what_is_cut_short_is_told(model):
    whole, cut = search(model, settings=GREEDY), search(model, settings=GREEDY, max_length=3)
    assert not whole["open"].any()
    assert np.array_equal(cut["open"], whole["lengths"][:, 0] > 3) and cut["open"].any()
    assert np.array_equal(cut["tokens"][2, :, :3], whole["tokens"][2, :, :3])


@pytest.mark.parametrize("settings", [BEAM, SAMPLING], ids=["beam", "sampling"])
def test_devices_that_share_a_batch_find_what_one_finds(model, settings):
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[: len(SOURCE)]), ("batch",))
    prefix = np.array([[5, 7], [6, PAD], [PAD, PAD]], "int32")
    shared, alone = (search(model, settings=settings, prefix=prefix, mesh=each) for each in (mesh, ONE))
    assert np.array_equal(shared["tokens"], alone["tokens"])
    np.testing.assert_allclose(shared["scores"], alone["scores"], atol=1e-5)
    assert (alone["tokens"][0, :, :2] == [5, 7]).all() and (alone["tokens"][1, :, 0] == 6).all()


@every_search
def test_sentences_that_come_and_go_find_what_each_finds_alone(ensemble, settings):
    """Seven sentences in two slots whose ring goes round several times; each begins when another one has ended."""
    rng = np.random.default_rng(5)
    sources = [[*rng.integers(3, V, rng.integers(1, 6)).tolist(), EOS] for _ in range(7)]
    limits, rngs = [3, 9, 8, 2, 9, 5, 7], jax.random.split(jax.random.key(1), 7)
    sampled = isinstance(settings, Sampling)
    slots, alone = Slots(ensemble, settings, (2, 7, LONGEST)), Slots(ensemble, settings, (2, 7, LONGEST))
    waiting, inside, steps, ends = list(range(7)), {}, [], 0
    while waiting or inside:
        for slot in range(2):
            if slot not in inside and waiting:
                inside[slot] = waiting.pop(0)
                number = inside[slot]
                slots.take(slot, sources[number], limits[number], rng=rngs[number] if sampled else None)
        found, step = slots.advance(enough=1)
        steps.append(step)
        for slot, number in list(inside.items()):
            if not found["open"][slot]:
                alone.take(0, sources[number], limits[number], rng=rngs[number] if sampled else None)
                expected, _ = alone.advance()
                for name in ("tokens", "lengths"):
                    assert np.array_equal(found[name][slot], expected[name][0]), number
                np.testing.assert_allclose(found["token_log_probs"][slot], expected["token_log_probs"][0], atol=1e-5)
                del inside[slot]
                slots.active[slot] = False
                ends += 1
    assert ends == 7 and any(one != other for one, other in steps[:-1])  # they do not stand at the same place


@every_search
def test_steps_one_by_one_and_a_slot_that_is_given_up_change_nothing(model, settings):
    whole, slots = search(model, settings=settings), Slots([model], settings, (3, 7, LONGEST))
    rngs = keys(settings) if isinstance(settings, Sampling) else [None] * 3
    for slot in range(3):
        slots.take(slot, SOURCE[slot], LIMITS[slot], rng=rngs[slot])
    for _ in range(LONGEST):
        found, step = slots.advance(steps=1)
        if settings.hypotheses == 1:  # the tokens so far
            assert np.array_equal(found["tokens"][0, 0, : step[0]], whole["tokens"][0, 0, : step[0]])
        slots.active[1] = False
    assert np.array_equal(found["tokens"][[0, 2]], whole["tokens"][[0, 2]])
    assert step[1] == 1


@pytest.mark.parametrize(
    "settings",
    [BEAM, *(pytest.param(settings, marks=pytest.mark.slow) for settings in (SAMPLING, GREEDY))],
    ids=["beam", "sampling", "greedy"],
)
def test_a_sentence_that_needs_more_places_goes_on_in_larger_slots(ensemble, settings):
    settings = settings.replace(min_length=LONGEST)
    rngs = keys(settings) if isinstance(settings, Sampling) else [None] * 3
    whole = search(*ensemble, settings=settings)
    small, large = Slots(ensemble, settings, (2, 7, 4)), Slots(ensemble, settings, (3, 8, LONGEST))
    large.take(1, SOURCE[2], 2, rng=rngs[2])
    large.advance()  # so that its ring has gone on
    large.active[1] = False
    small.take(0, SOURCE[1], LIMITS[1], rng=rngs[1])
    small.advance(steps=2)
    small.take(1, SOURCE[0], LIMITS[0], rng=rngs[0])
    for slot, number in ((0, 1), (1, 0)):
        found, step = small.advance()
        assert found["open"][slot] and step[slot] == 4
        options = {"pad_id": PAD, "mesh": ONE}
        large.progress = move(small.progress, large.progress, np.int32(slot), np.int32(2 - slot), **options)
        small.active[slot] = False
        large.active[2 - slot], large.limits[2 - slot] = True, LIMITS[number]
        if large.rngs is not None:
            large.rngs[2 - slot] = jax.random.key_data(rngs[number])
    found, _ = large.advance()
    for slot, number in ((2, 1), (1, 0)):
        for name in ("tokens", "lengths"):
            assert np.array_equal(found[name][slot], whole[name][number])
        np.testing.assert_allclose(found["token_log_probs"][slot], whole["token_log_probs"][number], atol=1e-5)


@pytest.mark.parametrize("layer", [0, -1])
def test_an_alignment_is_the_mean_of_the_models_own_weights_and_their_heads(make_model, layer):
    models = [make_model(V, seed, num_decoder_layers=2) for seed in (292, 293)]
    target = np.array([[7, 5, 9, 2, 0], [2, 0, 0, 0, 0], [3, 3, 4, 8, 2]], "int32")
    configs, params = split(models)
    aligned = np.asarray(align_targets(params, SOURCE, target, configs=configs, layer=layer, mesh=ONE))
    expected = []
    for config, own in models:
        apply = jax.jit(partial(Transformer(config).apply, deterministic=True, return_weights=True))
        expected += list(np.asarray(apply({"params": own}, SOURCE, target)[1].cross[layer]).swapaxes(0, 1))
    np.testing.assert_allclose(aligned, np.mean(expected, axis=0), atol=1e-6)
    assert aligned.shape == (3, 5, 7)
    np.testing.assert_allclose(aligned.sum(-1), target != PAD, atol=1e-5)
    assert (aligned.swapaxes(1, 2)[SOURCE == PAD] == 0).all()


def test_slots_work_in_a_program_with_64_bits(ensemble):
    found = search(*ensemble, settings=BEAM)
    with jax.enable_x64(True):
        wide = search(*ensemble, settings=BEAM)
    assert np.array_equal(found["tokens"], wide["tokens"])
