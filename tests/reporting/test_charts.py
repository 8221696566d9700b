"""The report's charts: true to scale, logarithmic where values span decades, validation in sight."""

import re
from pathlib import Path
from typing import Any

import pytest

from llmtune.plan.distances import Everything, Top
from llmtune.plan.table import PlanTable
from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.drawing import line_picture
from llmtune.reporting.charts.lines import Line, Lines, thin
from llmtune.reporting.charts.scales import (
    Scale,
    decades,
    linear_range,
    log_floor,
    log_range,
    needs_log,
    spans_decades,
    ticks,
)
from llmtune.reporting.comparison.charts import rates
from llmtune.reporting.course.loss import loss_chart, loss_section
from llmtune.reporting.history import read_history
from llmtune.reporting.page import report
from llmtune.reporting.studies.page import render as render_study
from llmtune.run_log import read_log
from tests.support.comparisons import curve, study
from tests.support.pages import Page, charted, empty, falling, page, stage, with_log

TRAINING, VALIDATION = "stroke:var(--tuned)", "stroke:var(--valid)"


def test_loss_chart_is_to_scale(tmp_path: Path) -> None:
    stages = [
        stage(0, 20, Top(0), {"0": 1e-3}),
        stage(20, 40, Everything(), {"0": 1e-3, "1": 1e-3, "2": 1e-3, "3": 1e-3}),
    ]
    run = with_log(empty(tmp_path), stages, falling({"0": 1e-3}))
    raw, mean, checks = charted(run, "Loss")
    assert len(raw) == len(mean) == 40
    assert [x for x, _ in checks] == [raw[step - 1][0] for step in (10, 20, 30, 40)]
    assert raw[-1][1] == pytest.approx(1)
    assert [y for _, y in checks] == [4, 3, 2, 1]
    assert mean[20] == pytest.approx(raw[20], abs=1e-6)  # the mean of a straight line is the line: it does not lag
    picture = Page(line_picture(loss_chart(read_history(read_log(run.log_file)), PlanTable.read(run.plan_file))))
    assert len(picture.all("circle")) == 4
    (first,) = picture.all("line", **{"class": "mark"})
    assert first["x1"] == f"{lines(picture, TRAINING)[0][19][0]:.1f}"
    marks = [line for line in report(run).read_text().split("\n") if '"stage 2"' in line]
    assert marks


def test_rate_chart_joins_distances_with_equal_rates(tmp_path: Path) -> None:
    rates = {str(distance): 1e-3 if distance < 31 else 1e-5 for distance in range(32)}
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), rates)], falling(rates), blocks=30)
    far, near = charted(run, "Learning rate by distance")
    text = page(run).text
    assert "distance 0 to 30" in text
    assert "distance 31" in text
    assert "logarithmic" in text
    assert near[0][1] > far[0][1]


def test_rate_chart_of_many_rates_has_color_ramp(tmp_path: Path) -> None:
    rates = {str(distance): 1e-3 * 0.95**distance for distance in range(32)}
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), rates)], falling(rates), blocks=30)
    assert len(charted(run, "Learning rate by distance")) == 32
    text = page(run).text
    assert "32 lines, distance 0 (peak 1e-3)  31 (peak 2e-4)" in text
    assert "logarithmic" not in text
    assert "1 the last block, 30 the first, 31 the embeddings" in text


def section_of(log: list[dict[str, Any]]) -> Page:
    """The loss section of a log."""
    return Page(loss_section(read_history(log), None))


def drawn(log: list[dict[str, Any]]) -> Page:
    """The picture of the loss of a log, as a model card shows it."""
    return Page(line_picture(loss_chart(read_history(log), None)))


def lines(part: Page, style: str) -> list[list[tuple[float, float]]]:
    """The lines of a picture in a color, each as its points in pixels."""
    drawings = [element["d"] for element in part.all("path", style=style)]
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", line)] for line in drawings]


def test_decades_are_equally_far_apart_on_a_logarithmic_scale() -> None:
    y = Scale(0.001, 10, 260, 20, log=True)
    assert [y(value) for value in (10, 1, 0.1, 0.01, 0.001)] == pytest.approx([20, 80, 140, 200, 260])
    assert y(1e-9) == y(0.001)
    assert y.ticks(5) == pytest.approx([10, 1, 0.1, 0.01, 0.001])


def test_values_are_equally_far_apart_on_a_linear_scale() -> None:
    y = Scale(0, 4, 260, 20)
    assert [y(value) for value in (4, 3, 2, 1, 0)] == pytest.approx([20, 80, 140, 200, 260])


def test_loss_over_two_decades_gets_a_logarithmic_axis() -> None:
    losses = [3.0, 1.0, 0.1, 0.01]
    found = drawn([{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    raw, _ = lines(found, TRAINING)
    heights = [y for _, y in raw]
    assert heights[2] - heights[1] == pytest.approx(heights[3] - heights[2], abs=0.11)
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 0.01}]
    assert "The scale is logarithmic." in section_of(log).text
    markup = line_picture(loss_chart(read_history(log), None))
    assert re.findall(r'text-anchor="end">([\d.]+)</text>', markup) == ["1", "0.1", "0.01"]


def test_loss_within_two_decades_gets_a_linear_axis() -> None:
    found = drawn([{"step": step, "loss": loss} for step, loss in enumerate([3.0, 2.0, 1.0, 0.031], 1)])
    (raw, _) = lines(found, TRAINING)
    assert raw[1][1] - raw[0][1] == pytest.approx(raw[2][1] - raw[1][1], abs=0.11)


def test_a_loss_of_zero_has_no_place_on_a_logarithmic_axis() -> None:
    found = drawn([{"step": step, "loss": loss} for step, loss in enumerate([3.0, 0.01, 0.0, 0.02], 1)])
    raw, _ = lines(found, TRAINING)
    assert len(raw) == 3


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_validations_are_markers_and_a_line_even_on_the_training_line(count: int) -> None:
    steps = range(1, 41)
    log: list[dict[str, Any]] = [{"step": step, "loss": 2.0 - step / 40} for step in steps]
    log += [{"step": 10 * number, "eval_loss": 2.0 - number / 4} for number in range(1, count + 1)]
    found = drawn(log)
    (validation,) = lines(found, VALIDATION)
    assert len(validation) == count
    circles = found.all("circle", style="fill:var(--valid)")
    assert len(circles) == count
    raw, _ = lines(found, TRAINING)
    assert validation[0] == raw[9]
    kinds = [element["class"] for element in found.all("path", style=VALIDATION)]
    assert kinds == ["marked"]
    paths_in_order = [element["style"] for element in found.all("path")]
    assert paths_in_order[2] == VALIDATION  # last, so nothing covers it
    text = section_of(log).text
    assert f"validation, last {2.0 - count / 4:.4g}" in text
    assert f"{2.0 - count / 4:.4g} at step {10 * count}" in text


def test_one_step_is_a_dot() -> None:
    found = drawn([{"step": 1, "loss": 2.0}])
    assert {circle["cx"] for circle in found.all("circle")} == {"748.0"}


def test_chart_tells_a_screen_reader_what_it_shows() -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 40, "loss": 1.0}, {"step": 40, "eval_loss": 1.5}]
    label = "Loss by step: training loss from 2 at step 1 to 1 at step 40; one validation, 1.5"
    markup = loss_section(read_history(log), None)
    assert f'"description": "{label}"' in markup
    assert f"{label}. Charts need JavaScript; the table holds the numbers." in Page(markup).text
    assert ["1", "2", "2", None or ""] in Page(markup).rows


def test_losses_that_are_not_finite_are_left_out_and_told() -> None:
    log: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": float("nan")}]
    log += [{"step": 3, "eval_loss": None}, {"step": 2, "eval_loss": float("inf")}]
    found = section_of(log)
    assert "2 of 3 training losses are not finite; they are not drawn." in found.text
    assert "The validation loss is not finite at step 2, 3." in found.text
    assert len(lines(drawn(log), TRAINING)[0]) == 1
    assert "nan" not in found.text


def test_a_step_that_was_logged_twice_is_drawn_once() -> None:
    log = [{"step": step, "loss": 4.0} for step in range(1, 31)] + [
        {"step": step, "loss": 2.0} for step in range(11, 41)
    ]
    history = read_history(log)
    assert [step for step, _ in history.losses] == list(range(1, 41))
    assert dict(history.losses)[11] == 2.0


def test_axes_have_round_ticks() -> None:
    assert ticks(0, 3.2, 5) == [0, 1, 2, 3]
    assert ticks(0.9, 1.1, 5) == [0.9, 0.95, 1.0, 1.05, 1.1]
    assert ticks(0, 225, 8) == [0, 50, 100, 150, 200]
    assert decades(1e-5, 1e-3) == pytest.approx([1e-3, 1e-4, 1e-5])
    assert len(decades(1e-18, 1e-3)) <= 7


def test_thinned_line_keeps_its_ends_and_its_peaks() -> None:
    long = [(float(step), 1.0) for step in range(5000)]
    long[2345] = (2345.0, 9.0)
    kept = thin(long)
    assert (kept[0], kept[-1]) == (long[0], long[-1])
    assert len(kept) <= 200
    assert (2345.0, 9.0) in kept
    assert kept == sorted(kept)


def test_ranges_hold_their_values() -> None:
    assert linear_range([0.0, 0.0])[1] > 0
    assert linear_range([1.0, 4.0])[0] == 0
    low, high = linear_range([3.0, 4.0])
    assert (low < 3.0, high > 4.0) == (True, True)
    assert log_range(0.01, [0.01, 5.0]) == pytest.approx((0.01 / 1.1, 5.5))
    assert spans_decades([1.0, 0.0, 0.01])
    assert not spans_decades([1.0, 0.0, 0.011])
    assert not spans_decades([0.0])
    assert log_floor([10.0, 1e-12]) == pytest.approx(1e-5)


def scales(markup: str, title: str) -> set[str]:
    """The kinds of scale that the charts of a page have on axes of a title."""
    axis = rf'"scale": {{([^}}]*)}}, "axis": {{"title": "{title}"'
    return {"log" if '"log"' in scale else "linear" for scale in re.findall(axis, markup)}


@pytest.mark.parametrize(("highest", "kind"), [(15.0, "log"), (8.0, "linear")])
def test_losses_of_a_search_that_span_decades_get_a_logarithmic_axis(highest: float, kind: str) -> None:
    """A rate that is too high drives one loss up; the rates themselves are over a logarithmic axis in any case."""
    chart = str(rates([("lora", [(1e-4, 0.6), (1e-3, 0.5), (1e-2, highest)])], {"lora": "red"}))
    assert scales(chart, "validation loss") == {kind}
    assert scales(chart, "learning rate at the output") == {"log"}
    tuned = study()
    tuned["trials"][0]["loss"], tuned["trials"][0]["curve"], tuned["log"] = highest * 2, curve(9.0, highest * 2), []
    page = render_study(tuned)
    assert scales(page, "validation loss") == {kind}
    assert scales(page, "method.lr") == {"log"}  # these values span decades, though they were listed
    assert scales(page, "adapter.r") == {"linear"}


def test_a_loss_of_zero_keeps_a_search_linear() -> None:
    assert needs_log([0.5, 15.0])
    assert not needs_log([0.0, 15.0])
    assert not needs_log([])


@pytest.mark.parametrize("value", [0.0, 1e-190, -3.0, 1e150, 7.0])
def test_draws_any_finite_value(value: float) -> None:
    points = [(1.0, value), (2.0, value), (3.0, value * 1.0000001)]
    for log in (False, True):
        chart = Lines([Line(points, "red", "a line")], "label", Axis("y", log=log and value > 0))
        assert "nan" not in line_picture(chart)
        assert "NaN" not in chart.draw()
