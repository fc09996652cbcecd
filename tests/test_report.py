"""The report: complete in itself, safe with any text, honest about the best."""

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from scoresde.errors import InputError
from scoresde.report import Figure, Report, SamplerResult, Score, Table, write_report
from scoresde.report import figures as plots

EVIL = "<script>alert('\"&')</script>"


class Page(HTMLParser):
    """Collects the elements of a page and checks that they nest."""

    VOID = ("meta", "img", "rect", "path")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in self.VOID, f"<{tag}> is not closed"
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def report(tmp_path):
    grid = plots.image_grid(torch.rand(16, 1, 8, 8), tmp_path / f"{EVIL[:8]}.png")
    return Report(
        title="digits_vp",
        subtitle="A first model.",
        facts=[("SDE", "VP"), ("data", "digits")],
        real=Figure("Real test data", grid),
        samplers=[
            SamplerResult("Euler-Maruyama", "500 steps", 500, 6.25, grid),
            SamplerResult("probability flow", "", 133.6, 75, grid),
        ],
        scores=[
            Score("model", 2.0004, 0.012, "bits/dim", "EMA weights"),
            Score("mixture", 1.75, 0.02, "bits/dim"),
            Score("Gaussian", 2.5, math.nan, "bits/dim"),
            Score("broken", math.nan, math.nan, "bits/dim"),
        ],
        figures=[Figure("Loss.", plots.loss_curve([], tmp_path / "loss.png"))],
        configuration="seed: 0\n",
    )


def write(report, tmp_path):
    path = write_report(report, tmp_path / "run" / "report.html")
    assert [x.name for x in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_holds_everything_and_asks_for_nothing(report, tmp_path):
    text = write(report, tmp_path)
    page = Page(text)
    sources = [image["src"] for image in page.all("img")]
    assert len(sources) == 4
    for source in sources:
        head, code = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(code, validate=True).startswith(b"\x89PNG")
    names = {name for _, attrs in page.tags for name in attrs}
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a"}
    assert not {name for name in names if name.startswith("on")} | names & {"href", "srcset"}
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import", text)


def test_shows_costs_and_scores(report, tmp_path):
    text = write(report, tmp_path)
    for part in ("500 NFE", "134 NFE", "6.2 s", "1 min 15 s", "2.000", "± 0.012", "not finite"):
        assert part in text
    assert "± nan" not in text


def test_samplers_without_a_picture_still_say_what_they_cost(report, tmp_path):
    bare = [replace(one, figure=None) for one in report.samplers]
    text = write(replace(report, samplers=bare, real=None), tmp_path)
    page = Page(text)
    assert [t for t in page.texts["td"] if t in ("500", "134", "6.2 s", "1 min 15 s")] == [
        *("500", "6.2 s", "134", "1 min 15 s")
    ]
    assert "cards" not in {attrs.get("class") for _, attrs in page.tags}


def test_remarks_stand_at_the_head_and_tables_hold_every_cell(report, tmp_path):
    table = Table("Numbers", "Of a column.", ("column", "of", "mean"), [("1", "data", "0.5")])
    text = write(replace(report, remarks=["It overfits."], tables=[table]), tmp_path)
    assert "It overfits." in text.partition("</header>")[0]
    page = Page(text)
    assert "Numbers" in page.texts["h2"]
    assert page.texts["td"][-3:] == ["1", "data", "0.5"]


def test_lowest_score_is_bold(report, tmp_path):
    assert Page(write(report, tmp_path)).texts["b"] == ["mixture", "1.750"]


def test_scores_compete_within_their_unit(report, tmp_path):
    scores = [*report.scores, Score("a", -3.0, 0.1, "nats"), Score("b", 4.0, 0.1, "nats")]
    page = Page(write(replace(report, scores=scores), tmp_path))
    assert page.texts["b"] == ["mixture", "1.750", "a", "-3.000"]
    assert len(page.all("table")) == 2 + 1  # with that of the samplers' costs
    bars = [(float(bar["x"]), float(bar["width"])) for bar in page.all("rect")]
    assert all(x >= 0 and width > 0 and x + width <= 100.01 for x, width in bars)


def test_escapes_every_text(report, tmp_path):
    evil = Report(
        title=EVIL,
        subtitle=EVIL,
        facts=[(EVIL, EVIL)],
        real=Figure(EVIL, report.real.path),
        samplers=[SamplerResult(EVIL, EVIL, 1, 1, report.real.path)],
        scores=[Score(EVIL, 1, 0.1, EVIL, EVIL)],
        figures=[Figure(EVIL, report.real.path)],
        configuration=EVIL,
        remarks=[EVIL],
        tables=[Table(EVIL, EVIL, [EVIL] * 3, [[EVIL] * 3])],
    )
    text = write(evil, tmp_path)
    page = Page(text)
    assert not page.all("script")
    assert "<script" not in text
    assert page.texts["h1"] == page.texts["pre"] == page.texts["title"] == [EVIL]
    assert [image["alt"] for image in page.all("img")] == [EVIL] * 3


@pytest.mark.parametrize(
    ("empty", "heading"),
    [
        ({"facts": ()}, "The run"),
        ({"samplers": ()}, "Samples"),
        ({"scores": ()}, "Scores on held-out data"),
        ({"figures": ()}, "Figures"),
        ({"configuration": " \n"}, "Configuration"),
    ],
)
def test_missing_parts_leave_no_trace(report, tmp_path, empty, heading):
    full = Page(write(report, tmp_path)).texts["h2"]
    rest = Page(write(replace(report, **empty), tmp_path)).texts["h2"]
    assert rest == [title for title in full if title != heading]


def test_title_alone_is_a_report(tmp_path):
    page = Page(write(Report("digits"), tmp_path))
    assert page.texts["h1"] == ["digits"]
    assert not {tag for tag, _ in page.tags} & {"section", "h2", "img", "table", "details"}


def test_hides_the_folders_of_the_machine(report, tmp_path):
    lines = [f"{folder}/x" for folder in (tmp_path / "run", Path.home(), Path.cwd())]
    text = write(replace(report, configuration="\n".join(lines)), tmp_path)
    (shown,) = Page(text).texts["pre"]
    assert shown.splitlines() == ["./x", "~/x", "./x"]
    assert str(tmp_path) not in text


def test_refuses_a_missing_picture_and_keeps_the_old_report(report, tmp_path):
    before = write(report, tmp_path)
    with pytest.raises(InputError, match=r"lost\.png is missing"):
        write_report(
            replace(report, figures=[Figure("x", tmp_path / "lost.png")]),
            tmp_path / "run" / "report.html",
        )
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == before
