import importlib
import io
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import pyplot  # noqa: E402

from flax_transformer import plots  # noqa: E402
from flax_transformer.masks import causal_mask, combine_masks, padding_mask, segment_mask  # noqa: E402
from flax_transformer.positions import sinusoidal_positions  # noqa: E402

SOURCE = ["Ein", "Mann", "läuft", "schnell", "</s>"]
TARGET = ["A", "man", "is", "running", "very", "fast", "</s>"]


def random_weights(*shape):
    weights = np.random.default_rng(0).random(shape)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def panels(figure):
    """The axes that hold an image, colour bars left out."""
    return [axes for axes in figure.axes if axes.images]


def shown(axes):
    return np.asarray(axes.images[0].get_array())


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def draw(figure):
    """Renders a figure, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), dpi=40)


def test_a_mask_is_drawn_visible_where_it_is_zero_after_broadcasting():
    valid = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    masks = {"causal": causal_mask(5), "padding": padding_mask(valid)}
    masks["both"] = combine_masks(*masks.values())
    figure = plots.plot_masks(masks)
    drawn = np.array([shown(axes) for axes in panels(figure)]).reshape(2, 3, 5, 5)
    visible = [np.broadcast_to(mask == 0, (2, 1, 5, 5))[:, 0] for mask in masks.values()]
    np.testing.assert_array_equal(drawn, np.stack(visible, axis=1))
    assert [axes.get_title() for axes in panels(figure)[:3]] == list(masks)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0: visible", "−∞: hidden"]
    draw(figure)


def test_a_small_mask_shows_numbers_in_its_cells():
    axes = panels(plots.plot_masks({"causal": causal_mask(3)}))[0]
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == {(m, q): "0" if m <= q else "−∞" for q in range(3) for m in range(3)}


def test_tokens_of_a_mask_label_the_right_axes():
    mask = segment_mask(jnp.ones((1, 7), int), jnp.array([[1, 1, 1, 2, 2]]))
    axes = panels(plots.plot_masks({"segments": mask}, query_tokens=TARGET, memory_tokens=SOURCE))[0]
    assert (labels(axes.yaxis), labels(axes.xaxis)) == (TARGET, SOURCE)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("query", "memory position")


@pytest.mark.parametrize(
    ("masks", "tokens", "message"),
    [
        ({}, None, "masks is empty"),
        ({"bias": jnp.full((1, 1, 5, 5), 0.5)}, None, "'bias' holds 0.5"),
        ({"flat": jnp.zeros((5, 5))}, None, r"shape \(5, 5\): give it \[B, 1, Q, M\]"),
        ({"causal": causal_mask(7)}, SOURCE, "query_tokens has 5 tokens, there are 7 queries"),
    ],
)
def test_invalid_masks_and_wrong_labels_are_refused(masks, tokens, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_masks(masks, query_tokens=tokens)


def test_position_vectors_share_one_scale_around_zero():
    positions = jnp.arange(7)
    encodings = {
        "interleaved": sinusoidal_positions(positions, 10),
        "halved": sinusoidal_positions(positions, 10, interleaved=False) / 2,
    }
    figure = plots.plot_positions(encodings)
    for axes, (name, vectors) in zip(panels(figure), encodings.items(), strict=True):
        np.testing.assert_array_equal(shown(axes), vectors)
        assert axes.images[0].get_clim() == (-1, 1)  # cos(0) is the largest of all
        assert (axes.get_title(), axes.get_xlabel()) == (name, "feature")
    assert panels(figure)[0].get_ylabel() == "position"
    draw(figure)


def test_each_schedule_is_a_line_with_the_rate_of_each_update():
    schedules = {"linear": optax.linear_schedule(0.0, 2.0, 4), "a number": lambda step: 0.5}
    axes = plots.plot_schedules(schedules, 7).axes[0]
    expected = {"linear": [0, 0.5, 1, 1.5, 2, 2, 2], "a number": [0.5] * 7}
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == expected
    assert all(line.get_xdata().tolist() == list(range(7)) for line in axes.lines)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(schedules)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("update", "learning rate")
    draw(axes.figure)


@pytest.mark.parametrize(("schedules", "steps"), [({}, 7), ({"constant": lambda step: 1.0}, 0)])
def test_no_schedule_and_no_steps_are_refused(schedules, steps):
    with pytest.raises(ValueError, match="at least"):
        plots.plot_schedules(schedules, steps)


def test_the_curve_of_a_training_has_the_losses_that_count():
    lines = [
        {"kind": "start", "step": 0},
        {"kind": "train", "step": 5, "loss": 9.0, "cross_entropy": 3.0},
        {"kind": "train", "step": 10, "loss": 9.0, "cross_entropy": None},
        {"kind": "valid", "step": 10, "loss": 2.5},
        {"kind": "train", "step": 5, "loss": 9.0, "cross_entropy": 3.5},
        {"kind": "train", "step": 15, "loss": 9.0, "cross_entropy": 2.0},
    ]
    (axes,) = plots.plot_training(lines).axes
    drawn = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {"train": (5, 15, 3.5, 2.0), "valid": (10, 2.5)}
    with pytest.raises(ValueError, match="train first"):
        plots.plot_training(lines[:1])


@pytest.mark.parametrize("heads", [1, 7])  # seven panels take two rows and leave one place empty
def test_each_head_is_a_panel_with_tokens_on_both_axes_and_weights_from_zero_to_one(heads):
    weights = random_weights(heads, 7, 5)
    figure = plots.plot_attention(weights, SOURCE, TARGET, title="cross")
    drawn = panels(figure)
    np.testing.assert_array_equal([shown(axes) for axes in drawn], weights)
    assert [axes.get_title() for axes in drawn] == [f"head {head}" for head in range(heads)]
    assert figure.get_suptitle() == "cross"
    for axes in drawn:
        assert axes.images[0].get_clim() == (0, 1)
        assert labels(axes.xaxis) == SOURCE
        assert axes.get_xlabel() == "memory position"
    assert labels(drawn[0].yaxis) == TARGET
    assert drawn[0].get_ylabel() == "query"
    draw(figure)


def test_weights_without_a_head_dimension_are_one_panel():
    weights = jnp.asarray(random_weights(7, 5))
    (axes,) = panels(plots.plot_attention(weights, SOURCE, TARGET))
    np.testing.assert_array_equal(shown(axes), weights)


@pytest.mark.parametrize(
    ("shape", "titles", "message"),
    [
        ((7, 4), None, "source_tokens has 5 tokens, there are 4 columns"),
        ((3, 6, 5), None, "target_tokens has 7 tokens, there are 6 rows"),
        ((3, 7, 5), ["one", "two"], "head_titles has 2 entries for 3 heads"),
        ((2, 3, 7, 5), None, "choose one layer and one sentence"),
    ],
)
def test_weights_that_do_not_fit_are_refused(shape, titles, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_attention(random_weights(*shape), SOURCE, TARGET, head_titles=titles)


def test_dollar_signs_do_not_start_a_formula():
    figure = plots.plot_attention(random_weights(1, 2), ["US$5", r"$\frac$"], ["$1 or $2"])
    draw(figure)
    assert labels(panels(figure)[0].yaxis) == ["$1 or $2"]


def test_figures_do_not_use_pyplot():
    plots.plot_masks({"causal": causal_mask(3)})
    plots.plot_attention(random_weights(7, 5), SOURCE, TARGET)
    assert pyplot.get_fignums() == []


def test_links_join_the_words_that_attend_and_are_thicker_for_more_weight():
    weights = np.array([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]])
    figure = plots.plot_links(weights, ["46", "ವರ್ಷಗಳ", "</s>"], ["46", "years"])
    (axes,) = figure.axes
    drawn = sorted(line.get_linewidth() for line in axes.lines)
    assert drawn == pytest.approx([0.4, 0.8, 3.2, 3.6])
    assert [text.get_text() for text in axes.texts] == ["46", "ವರ್ಷಗಳ", "</s>", "46", "years"]
    draw(figure)


def test_links_of_a_translation_that_is_being_written_hide_what_comes_later():
    (axes,) = plots.plot_links(np.eye(3), list("abc"), list("xyz"), shown=2).axes
    assert len(axes.lines) == 2
    assert [text.get_alpha() for text in axes.texts] == [1, 1, 1, 1, 1, 0]


def test_links_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 target and 3 source tokens"):
        plots.plot_links(np.eye(3), list("abc"), list("xy"))


def test_without_matplotlib_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("plots", "figures"):
        monkeypatch.delitem(sys.modules, f"flax_transformer.{name}")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "flax_transformer\[plots\]"'):
        importlib.import_module("flax_transformer.plots")
