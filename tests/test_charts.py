import pytest

pytest.importorskip("matplotlib")

from flax_transformer.charts import Curves, plot_curves, plot_scores


def curves(**changes):
    settings = {"title": "It falls", "x_label": "update", "y_label": "loss, nats", "curves": {"one": {1: 2.0, 5: 1.0}}}
    return Curves(**settings | changes)


def test_a_curve_goes_through_the_means_of_the_seeds_in_order_and_its_band_from_lowest_to_highest():
    figure = plot_curves([curves(curves={"GRU": {5: [1.0, 3.0], 1: [4.0, 5.0, 9.0]}, "other": {1: 1.0}})])
    (axes,) = figure.axes
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [1, 5] and line.get_ydata().tolist() == [6.0, 2.0]
    corners = axes.collections[0].get_paths()[0].vertices.tolist()
    assert {(1.0, 4.0), (1.0, 9.0), (5.0, 1.0), (5.0, 3.0)} <= set(map(tuple, corners))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["GRU", "other"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("It falls", "update", "loss, nats")


def test_panels_have_scales_of_their_own():
    figure = plot_curves([curves(log_x=True), curves(log_y=True)])
    scales = [(axes.get_xscale(), axes.get_yscale()) for axes in figure.axes]
    assert scales == [("log", "linear"), ("linear", "log")]
    assert figure.axes[0].get_ylim() != figure.axes[1].get_ylim()


def test_each_seed_is_a_dot_and_the_mean_a_line_and_a_number():
    figure = plot_scores({"phrases": {"sines": [90.0, 91.0, 95.0], "none": [40.0]}}, x_label="%")
    (axes,) = figure.axes
    assert [dots.get_offsets().tolist() for dots in axes.collections] == [
        [[90.0, 0.0], [91.0, 0.0], [95.0, 0.0]],
        [[40.0, 1.0]],
    ]
    assert [line.get_xdata()[0] for line in axes.lines] == [92.0, 40.0]
    assert [text.get_text() for text in axes.texts] == ["92.0", "40.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sines", "none"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_curves([]),
        lambda: plot_curves([curves(curves={})]),
        lambda: plot_scores({}, x_label="%"),
        lambda: plot_scores({"phrases": {}}, x_label="%"),
    ],
)
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(ValueError, match="is empty: give at least one"):
        draw()
