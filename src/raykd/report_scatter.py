"""Report scatter: accuracy against the length and the form of answers, so that an effect of form is seen as one."""

from dataclasses import dataclass

from markupsafe import Markup

from raykd.measured import Mean, Share
from raykd.report_plots import Axis, axis_over
from raykd.report_text import percent
from raykd.results import Arm, Results

HEIGHT_PX = 260
NUM_COLORS = 8


@dataclass(frozen=True)
class Scatter:
    """Every arm's accuracy, strict (dot) and flexible (ring), over something else."""

    title: str
    svg: Markup


def colors(results: Results) -> dict[str, str]:
    """The class of colour of each arm, wherever arms are told apart by it."""
    names = [arm.name for arm in results.arms if arm.kind != "untouched"]
    found = {name: f"c{number % NUM_COLORS}" for number, name in enumerate(names)}
    return {arm.name: found.get(arm.name, "untouched") for arm in results.arms}


def scatters(results: Results) -> list[Scatter]:
    """Accuracy against the share of answers in form, and against their length; none where there are no answers."""
    arms = [arm for arm in results.arms if arm.measured.n]
    if not arms:
        return []
    return [
        _scatter(results, "Answers in form, %", arms, [_times(arm.measured.answer_in_form, 100) for arm in arms], 100),
        _scatter(results, "Tokens of an answer", arms, [_times(arm.measured.tokens, 1) for arm in arms], None),
    ]


def _scatter(
    results: Results, title: str, arms: list[Arm], spans: list[tuple[float, float, float]], most: float | None
) -> Scatter:
    """One plot.

    Args:
        results: of the experiment, for the colours.
        title: what is along the axis.
        arms: those that have answers.
        spans: for each where it lies along the axis: value, low, high.
        most: where the axis ends; None for wherever the values do.
    """
    x = axis_over([bound for span in spans for bound in span[1:]], 0, most if most is not None else float("inf"))
    shares = [share for arm in arms for share in (arm.measured.strict, arm.measured.flexible)]
    y = axis_over([100 * bound for share in shares for bound in (share.low, share.high) if bound is not None], 0, 100)
    css = colors(results)
    marks = [_arm(x, y, arm, css[arm.name], span) for arm, span in zip(arms, spans, strict=True)]
    grid = [
        Markup('<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{1}"/>').format(x.at(tick), HEIGHT_PX)
        + Markup('<text x="{:.2f}%" y="{}" text-anchor="middle">{:g}</text>').format(x.at(tick), HEIGHT_PX + 18, tick)
        for tick in x.ticks
    ]
    grid += [
        Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(_height(y, tick))
        + Markup('<text x="-8" y="{:.1f}" dy=".35em" text-anchor="end">{:g}</text>').format(_height(y, tick), tick)
        for tick in y.ticks
    ]
    svg = Markup('<svg class="scatter" width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        HEIGHT_PX, f"Accuracy in percent against: {title}", Markup("").join([*grid, *marks])
    )
    return Scatter(title, svg)


def _arm(x: Axis, y: Axis, arm: Arm, color: str, span: tuple[float, float, float]) -> Markup:
    value, low, high = span
    strict, flexible = arm.measured.strict, arm.measured.flexible
    said = f"{arm.name}: strict {percent(strict.value)} %, flexible {percent(flexible.value)} %, at {value:.1f}"
    parts = [Markup("<title>{}</title>").format(said)]
    for share, shape in ((flexible, "ring"), (strict, "dot")):
        at, bottom, top = (_height(y, 100 * (bound or 0)) for bound in (share.value, share.low, share.high))
        parts.append(
            Markup(
                '<line class="interval" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1:.1f}" y2="{2:.1f}"/>'
                '<circle class="{3}" cx="{0:.2f}%" cy="{4:.1f}" r="5"/>'
            ).format(x.at(value), top, bottom, shape, at)
        )
    across = _height(y, 100 * (strict.value or 0))
    parts.append(
        Markup('<line class="interval" x1="{:.2f}%" x2="{:.2f}%" y1="{:.1f}" y2="{:.1f}"/>').format(
            x.at(low), x.at(high), across, across
        )
    )
    return Markup('<g class="point {}">{}</g>').format(color, Markup("").join(parts))


def _height(y: Axis, value: float) -> float:
    return HEIGHT_PX * (1 - y.at(value) / 100)


def _times(value: Share | Mean, unit: float) -> tuple[float, float, float]:
    middle = unit * (value.value or 0.0)
    low, high = (unit * bound if bound is not None else middle for bound in (value.low, value.high))
    return middle, low, high
