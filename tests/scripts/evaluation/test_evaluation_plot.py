"""The plot of an evaluation: its ticks, its points and their labels."""

import numpy as np
import pytest
from PIL import ImageColor

from scripts.evaluation import plot
from scripts.evaluation.scores import Estimate


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.17, 0.36), (-0.5, 0.02), (0.9991, 0.9999), (0, 47)])
def test_ticks_are_few_round_and_within(low, high):
    found = plot.ticks(low, high)
    assert 3 <= len(found) <= 10
    assert low - 1e-9 <= min(found)
    assert max(found) <= high + 1e-9
    assert len({f"{x:.4g}" for x in found}) == len(found)


def pixels_of(image, colour):
    return (np.asarray(image) == ImageColor.getrgb(colour)).all(axis=-1)


def points(*places):
    return [plot.Point(f"epoch-{i}", "run", Estimate(x, 0.01), Estimate(y, 0.02)) for i, (x, y) in enumerate(places)]


def test_the_plot_shows_the_chosen_one_where_it_belongs():
    places = points((0.1, 0.4), (0.2, 0.6), (0.4, 0.5))
    image = plot.plot(places, Estimate(0.3, 0.02), "epoch-1", "DINOv2")
    rows, columns = np.nonzero(pixels_of(image, plot.CHOSEN))
    others_rows, others_columns = np.nonzero(pixels_of(image, plot.LINE))
    assert rows.mean() < others_rows.mean()  # this point is the highest
    assert columns.min() > others_columns.min()
    assert not pixels_of(plot.plot(places, Estimate(0.3, 0.02), None, "x"), plot.CHOSEN).any()


def test_labels_of_near_points_do_not_cover_each_other(monkeypatch):
    written = []
    monkeypatch.setattr(plot.Axes, "text", lambda self, x, y, text, size=15, *how: written.append((x, y, text, size)))
    plot.plot(points((0.10, 0.4), (0.101, 0.401), (0.102, 0.4)), Estimate(0.3, 0.0), None, "x")
    labels = [(x, y) for x, y, text, _ in written if text.startswith("epoch")]
    assert len(labels) == 3
    for i, (x, y) in enumerate(labels):
        assert all(abs(y - other) >= 14 or abs(x - across) > 50 for across, other in labels[:i])


def test_one_lora_can_be_plotted():
    image = plot.plot(points((0.1, 0.4)), Estimate(0.4, 0.0), "epoch-0", "likeness")
    assert pixels_of(image, plot.CHOSEN).sum() > 20
