"""The picture of a report: well-formed, true to the pixel, and there for every kind of run.

A plot is 220 pixels wide and 140 high, with y = 0 at its top.
"""

from xml.etree import ElementTree

import pytest

from picture import draw

ROW = {"k": 5, "n": 10, "low": 0.25, "high": 0.75}
NONE = {"k": 0, "n": 0, "low": 0.0, "high": 1.0}
METRICS = [{"step": 1, "sft": 0.1, "pg": 10.0}, {"step": 2, "sft": 0.01, "pg": 1.0}]
METRICS += [{"step": 3, "sft": 0.001, "pg": 0.1}]
LINES = [{"line": 3, "text": "a < b & c\x1b\n", "nll": 4.0}, {"line": 1, "text": "x", "nll": 1.0}]
REPORT = {
    "agreement_by_turn": {turn: {"base": NONE, "adapter": ROW} for turn in ("first", "last")},
    "recall": {"ratio": 0.5, "lines": LINES},
}


def parts(svg: str, tag: str) -> list:
    """All elements of a kind; raises if the text is no XML."""
    return list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag))


def said(svg: str) -> str:
    return " | ".join(text.text or "" for text in parts(svg, "text"))


def test_a_point_of_a_curve_is_a_step():
    """On four decades of 35 pixels, 0.1, 0.01, 0.001 lie at 70, 105, 140 and 10, 1, 0.1 above."""
    curves = [line.get("points") for line in parts(draw(REPORT, METRICS, "os"), "polyline")]
    sft = "0.0,70.0 110.0,105.0 220.0,140.0"
    pg = "0.0,0.0 110.0,35.0 220.0,70.0"
    assert curves == [sft, pg]


@pytest.mark.parametrize("untrained, curve", [("pg", "SFT"), ("sft", "PG")])
def test_a_loss_that_was_not_trained_has_no_curve(untrained, curve):
    """With lam 1 there is no PG, with lam 0 no SFT."""
    svg = draw({}, [row | {untrained: 0.0} for row in METRICS], "os")
    assert len(parts(svg, "polyline")) == 1
    assert curve in said(svg) and untrained.upper() not in said(svg)


def test_the_ends_of_an_interval():
    """0.25 to 0.75 of 140 pixels are 105 and 35, k of n is at 70; the adapter stands 6 to the right
    of the middle of its turn, which for the first of two is 55.
    """
    svg = draw({"agreement_by_turn": REPORT["agreement_by_turn"]}, [], "os")
    assert [bar.get("d") for bar in parts(svg, "path")] == ["M61.0 105.0V35.0", "M171.0 105.0V35.0"]
    assert {dot.get("cy") for dot in parts(svg, "circle")} == {"70.0"}
    assert said(svg).count("5/10") == 2 and "0/0" not in said(svg)  # n = 0 is left out


def test_rules_without_a_witness_are_not_drawn():
    """Two of three are tested; the second stands at three quarters of 220, named by its line."""
    rules = [
        ({"lines": [line, line]} | {"obeyed": row}) for line, row in ((2, ROW), (4, NONE), (9, ROW))
    ]
    svg = draw({"exam": rules}, [], "os")
    assert [bar.get("d") for bar in parts(svg, "path")] == ["M55.0 105.0V35.0", "M165.0 105.0V35.0"]
    assert "2 of 3 rules tested" in said(svg) and said(svg).count("5/10") == 2
    assert " 9 " in said(svg) and " 4 " not in said(svg)


def test_lines_stand_in_the_order_of_the_prompt():
    """Line 1 before line 3, whose 4 nats fill the height; 1 nat is a quarter of it."""
    svg = draw({"recall": REPORT["recall"]}, [], "os")
    needles = [bar.get("d") for bar in parts(svg, "path")]
    assert needles == ["M73.3 140.0V105.0", "M220.0 140.0V0.0"]
    assert "line 3: a < b & c\ufffd" in said(svg)  # escaped, and a control code is no XML


def test_texts_are_escaped():
    """The name of a run may hold what XML reads as its own."""
    assert "<os> & \ufffd" in said(draw(REPORT, METRICS, "<os> & \udcff"))


@pytest.mark.parametrize(
    "report, metrics, panels",
    [
        (REPORT | {"exam": [{"lines": [1, 2], "obeyed": ROW}]}, METRICS, 4),
        (REPORT, METRICS, 3),
        (REPORT, METRICS[:1], 3),  # one step
        (REPORT, [], 2),
        (REPORT | {"recall": None}, METRICS, 2),
        ({"recall": {"lines": [{"text": "x", "nll": 1.0}]}}, METRICS, 1),  # of an older version
        ({"recall": {"lines": [{"line": 1, "text": "x", "nll": 0.0}]}}, [], 1),
        ({"agreement_by_turn": {"first": {"base": NONE, "adapter": NONE}}}, [], 0),
        ({}, [], 0),
    ],
)
def test_what_is_missing_is_left_out(report, metrics, panels):
    """A panel a kind of data, the same text each time, and XML in every case."""
    svg = draw(report, metrics, "os")
    assert len(parts(svg, "g")) == panels
    assert svg == draw(report, metrics, "os")
