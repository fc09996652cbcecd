"""The report of a run: a single HTML file.

It is self-contained: it includes its pictures, runs no scripts and loads nothing from the network,
so it can be mailed or archived as it is. Text from the user is escaped. Folders of the machine (of
the report, the working directory, the home) are written as ``.`` and ``~``.
"""

import base64
import math
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from scoresde.errors import InputError

SHARPNESS = 1.5  # pixels of a picture per pixel of the page
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Figure:
    """A picture with a caption.

    Arguments:
        caption: The caption.
        path: A PNG file.
    """

    caption: str
    path: Path


@dataclass(frozen=True)
class SamplerResult:
    """The results of one sampler.

    Arguments:
        name: The sampler.
        settings: Its hyper-parameters: ``500 steps``.
        nfe: Network evaluations per sample, the mean if they differ.
        seconds: Wall-clock time of all its samples, in seconds.
        figure: A PNG file of the samples, if there is one.
    """

    name: str
    settings: str
    nfe: float
    seconds: float
    figure: Path | None = None


@dataclass(frozen=True)
class Score:
    """A figure of merit, lower is better.

    Arguments:
        name: The name of the model or baseline.
        value: The value.
        standard_error: Its standard error in the same unit; NaN if unknown.
        unit: The unit: ``bits/dim``. Scores are compared within a unit.
        note: A remark shown under the name.
    """

    name: str
    value: float
    standard_error: float
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Numbers in rows and columns.

    Arguments:
        title: The title.
        about: An explanation of the numbers.
        head: The names of the columns.
        rows: The cells, as texts; the first two columns of a table are names.
    """

    title: str
    about: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """The contents of a report; empty parts are omitted.

    Arguments:
        title: The name of the recipe.
        subtitle: One sentence below it.
        remarks: Warnings at the top, such as that the model overfits.
        facts: Facts of the run, as pairs of a name and a value.
        real: Real data, shown next to the samples.
        samplers: The results of the samplers.
        scores: Scores of the model and of its baselines.
        tables: Other numbers.
        figures: Other pictures.
        configuration: The run's configuration in YAML.
        data_sets: Whether the scores compare data sets rather than models.
    """

    title: str
    subtitle: str = ""
    facts: Sequence[tuple[str, str]] = ()
    real: Figure | None = None
    samplers: Sequence[SamplerResult] = ()
    scores: Sequence[Score] = ()
    figures: Sequence[Figure] = ()
    configuration: str = ""
    data_sets: bool = False
    remarks: Sequence[str] = ()
    tables: Sequence[Table] = ()


def write_report(report: Report, path: Path) -> Path:
    """Writes a report atomically, replacing a file of that name.

    Arguments:
        report: The contents.
        path: Output file, such as ``RUN/report.html``.

    Raises:
        InputError: If a picture is missing or is not a PNG file.
    """
    path = Path(path)
    pieces = re.split(r'(;base64,[^"]*)', _page(report))
    text = "".join(p if i % 2 else _without_folders(p, path) for i, p in enumerate(pieces))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    return draft.replace(path)


# ---- the page and its sections -----------------------------------------------------------------


def _page(report: Report) -> str:
    alone = [] if report.real is None or report.samplers else [report.real]
    parts = [
        _header(report),
        _facts(report.facts),
        _samples(report.real, report.samplers),
        _scores(report.scores, report.data_sets),
        *(_numbers(table) for table in report.tables),
        _figures([*alone, *report.figures]),
        _configuration(report.configuration),
    ]
    body = "\n".join(part for part in parts if part)
    return _PAGE.format(title=escape(report.title), style=_STYLE, body=body)


def _header(report: Report) -> str:
    subtitle = f'\n<p class="subtitle">{escape(report.subtitle)}</p>' if report.subtitle else ""
    remarks = "".join(f'\n<p class="remark">{escape(text)}</p>' for text in report.remarks)
    return f"<header>\n<h1>{escape(report.title)}</h1>{subtitle}{remarks}\n</header>"


def _section(title: str, about: Iterable[str], content: str) -> str:
    paragraph = f'<p class="about">{" ".join(about)}</p>'
    return f"<section>\n<h2>{title}</h2>\n{paragraph}\n{content}\n</section>"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    if not facts:
        return ""
    rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    content = '<dl class="facts">\n' + "\n".join(rows) + "\n</dl>"
    return _section("The run", ["What was done, on what, and how."], content)


def _samples(real: Figure | None, samplers: Sequence[SamplerResult]) -> str:
    if not samplers:
        return ""
    cards = [] if real is None else [_card(real.path, real.caption, "", ["from the data set"])]
    for one in samplers:
        if one.figure is not None:
            cost = [f"{one.nfe:,.0f} NFE", _duration(one.seconds)]
            cards.append(_card(one.figure, one.name, one.settings, cost))
    about = _ABOUT_SAMPLES + ([_ABOUT_REAL] if real is not None else [])
    shown = '<div class="cards">\n' + "\n".join(cards) + "\n</div>" if cards else ""
    return _section("Samples", about, f"{_costs(samplers)}\n{shown}")


def _costs(samplers: Sequence[SamplerResult]) -> str:
    rows = [
        (one.name, one.settings, f"{one.nfe:,.0f}", _duration(one.seconds)) for one in samplers
    ]
    return _cells(("sampler", "settings", "NFE", "seconds"), rows)


def _numbers(table: Table) -> str:
    return _section(escape(table.title), [escape(table.about)], _cells(table.head, table.rows))


def _cells(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of texts; its first two columns are names."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ["", "", *[' class="number"'] * (len(cells) - 2)]
        inner = "".join(
            f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<table class="plain">\n<thead>{line("th", head)}</thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table>"
    )


def _card(path: Path, name: str, settings: str, cost: Sequence[str]) -> str:
    lines = [f"<strong>{escape(name)}</strong>"]
    if settings:
        lines.append(f"<span>{escape(settings)}</span>")
    lines.append(f'<span class="cost">{" · ".join(cost)}</span>')
    return _figure("card", _image(path, name), "\n".join(lines))


def _scores(scores: Sequence[Score], data_sets: bool) -> str:
    if not scores:
        return ""
    units = list(dict.fromkeys(one.unit for one in scores))
    ordered = sorted(scores, key=lambda one: units.index(one.unit))
    groups = groupby(ordered, lambda one: one.unit)
    tables = [_table(unit, list(group), data_sets) for unit, group in groups]
    about = [text for word, text in _ABOUT_UNITS.items() if any(word in unit for unit in units)]
    about.append(_ABOUT_DATA if data_sets else _ABOUT_MODELS)
    if any(math.isfinite(one.standard_error) for one in scores):
        about.append(_ABOUT_ERRORS)
    return _section("Scores on held-out data", about, "\n".join(tables))


def _table(unit: str, scores: Sequence[Score], data_sets: bool) -> str:
    finite = [one for one in scores if math.isfinite(one.value)]
    best = min((one.value for one in finite if not data_sets), default=math.nan)
    what = "data" if data_sets else "model"
    ends = [one.value + s * _error(one) for one in finite for s in (-1, 1)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    rows = "\n".join(_row(one, one.value == best, low, high) for one in scores)
    head = f'<tr><th>{what}</th><th class="number">{escape(unit)}</th><th class="wide"></th></tr>'
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _row(score: Score, best: bool, low: float, high: float) -> str:
    name = escape(score.name)
    value = f"{score.value:.3f}" if math.isfinite(score.value) else "not finite"
    if best:
        name, value = f"<b>{name}</b>", f"<b>{value}</b>"
    if math.isfinite(score.standard_error):
        value += f' <span class="error">± {score.standard_error:.3f}</span>'
    note = f'<span class="note">{escape(score.note)}</span>' if score.note else ""
    bar = _bar(score, low, high) if math.isfinite(score.value) else ""
    kind = ' class="best"' if best else ""
    return (
        f'<tr{kind}><td>{name}{note}</td><td class="number">{value}</td>'
        f'<td class="wide">{bar}</td></tr>'
    )


def _bar(score: Score, low: float, high: float) -> str:
    """Draws a score as a bar from zero, with its standard error as a whisker."""

    def place(value: float) -> float:
        return 100 * (value - low) / ((high - low) or 1.0)

    left, right = sorted((place(0.0), place(score.value)))
    marks = f'<rect x="{left:.2f}" y="2" width="{right - left:.2f}" height="12" />'
    if _error(score) > 0:
        a, b = (place(score.value + s * _error(score)) for s in (-1, 1))
        marks += f'<path d="M{a:.2f} 8H{b:.2f}M{a:.2f} 5V11M{b:.2f} 5V11" />'
    return f'<svg viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">{marks}</svg>'


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    drawn = [
        _figure("plot", _image(one.path, one.caption), escape(one.caption)) for one in figures
    ]
    return _section("Figures", ["The same run in pictures."], "\n".join(drawn))


def _figure(kind: str, image: str, caption: str) -> str:
    return f'<figure class="{kind}">\n{image}\n<figcaption>{caption}</figcaption>\n</figure>'


def _configuration(text: str) -> str:
    if not text.strip():
        return ""
    return (
        "<section>\n<h2>Configuration</h2>\n<details>\n<summary>All settings of the run, as YAML"
        f"</summary>\n<pre>{escape(text.strip())}</pre>\n</details>\n</section>"
    )


# ---- small parts -------------------------------------------------------------------------------


def _image(path: Path, alt: str) -> str:
    """Embeds a PNG file."""
    path = Path(path)
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith(PNG):
        raise InputError(
            f"{path} is missing or is not a PNG file; draw it with scoresde.report.figures before "
            "the report."
        )
    width, height = struct.unpack(">II", data[16:24])
    code = base64.b64encode(data).decode("ascii")
    return (
        f'<img src="data:image/png;base64,{code}" alt="{escape(alt)}" '
        f'width="{width / SHARPNESS:.0f}" height="{height / SHARPNESS:.0f}" />'
    )


def _error(score: Score) -> float:
    return score.standard_error if math.isfinite(score.standard_error) else 0.0


def _duration(seconds: float) -> str:
    """Formats a duration for reading.

    Example:
        >>> _duration(0.042), _duration(3.21), _duration(135), _duration(8000)
        ('0.04 s', '3.2 s', '2 min 15 s', '2 h 13 min')
    """
    if not math.isfinite(seconds):
        return "time unknown"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _without_folders(text: str, path: Path) -> str:
    """Replaces the machine's folders by ``.`` and ``~``, longest first."""
    folders = {str(Path.home()): "~", str(Path.cwd()): ".", str(path.resolve().parent): "."}
    for folder in sorted(folders, key=len, reverse=True):
        if folder.strip("/"):
            whole = rf"(?<![\w./~-]){re.escape(escape(folder))}(?![\w-])"
            text = re.sub(whole, folders[folder], text)
    return text


_ABOUT_SAMPLES = [
    "Drawn from pure noise by the same network; the samplers differ in how they integrate from"
    " noise to data.",
    "<abbr>NFE</abbr>, the number of function evaluations, counts the network passes that a"
    " sample took: what sampling costs on any machine. Seconds are wall-clock time for the whole"
    " batch on this one.",
]
_ABOUT_REAL = "Good samples cannot be told from the real data, and do not repeat each other."
_ABOUT_UNITS = {
    "bits/dim": "Bits/dim says how many bits the model needs to store one value (a pixel, say) of"
    " an example that it has not seen, without loss.",
    "nats": "Nats say how surprising an example is to the model that has not seen it: the negative"
    " logarithm of its density in the units of the data.",
}
_ABOUT_MODELS = "Lower is better; the best is in bold."
_ABOUT_DATA = "The lower, the more likely the model finds the data."
_ABOUT_ERRORS = (
    "± is one standard error: how far the mean would move with other held-out examples and other"
    " random draws of the estimate. It does not cover another training seed."
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="color-scheme" content="light dark" />
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'" />
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Written by scoresde. This file is complete: it needs no other and no network.</footer>
</body>
</html>
"""

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
