"""Report text: how a number is written, and the answer to the experiment's question in words."""

from dataclasses import dataclass, field

from raykd.comparison import BASELINE, Comparison
from raykd.config import UNTOUCHED
from raykd.measured import Mean, Share
from raykd.results import Results

NOTHING = "–"


@dataclass(frozen=True)
class Answer:
    """What the experiment found: a figure to see first, two sentences, and what to bear in mind."""

    sentences: tuple[str, str]
    figure: str = ""
    figure_caption: str = ""
    remarks: list[str] = field(default_factory=list)


def percent(share: float | None) -> str:
    """A share as percent with one decimal, without the sign."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    if difference is None:
        return NOTHING
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def interval(share: Share) -> str:
    """The interval of a share, in percent."""
    return NOTHING if share.low is None else f"{percent(share.low)}–{percent(share.high)}"


def share_and_interval(share: Share) -> str:
    """A share and its interval, in percent: `61.3 (55.7–66.7)`."""
    return NOTHING if share.value is None else f"{percent(share.value)} ({interval(share)})"


def mean_and_interval(mean: Mean, unit: float = 1) -> str:
    """A mean and its interval, in so many of a unit: `61.3 (55.7–66.7)`."""
    if mean.value is None:
        return NOTHING
    value = amount(unit * mean.value, 1)
    if mean.low is None or mean.high is None:
        return value
    return f"{value} ({amount(unit * mean.low, 1)}–{amount(unit * mean.high, 1)})"


def points_interval(comparison: Comparison) -> str:
    """The interval of a difference, in percentage points."""
    return f"{points(comparison.low)} to {points(comparison.high)}"


def p_value(p: float) -> str:
    """A p-value with two figures; below 0.001 only that."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def amount(value: float | None, decimals: int = 0) -> str:
    """A count or a mean, with thousands separators."""
    return NOTHING if value is None else f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: `8.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def answer(results: Results) -> Answer:
    """The best primed arm against the unprimed one, worded no more strongly than the numbers bear."""
    primed = [arm for arm in results.arms if arm.kind == "primed" and arm.measured.n]
    if not primed:
        return _answer_without_primed(results)
    # What a prime is worth is told by an arm that differs from another in nothing else.
    told = {c.arm: c for c in results.strict if c.baseline.prime_alone}
    best = max([arm for arm in primed if arm.name in told] or primed, key=lambda arm: arm.measured.strict.value or 0.0)
    strict_share, num_problems = best.measured.strict, amount(best.measured.num_problems)
    said = (
        f"Distilled from a teacher primed with “{best.strategy}”, the student answers "
        f"{percent(strict_share.value)} % of {num_problems} test problems correctly"
    )
    strict = told.get(best.name)
    baseline = results.arm(strict.baseline.arm) if strict else None
    if strict is None or baseline is None:
        return Answer(
            (
                f"{said} (strict match, 95 % interval {interval(strict_share)}).",
                "What the prime is worth cannot be told: no arm that differs from it in the prime alone answered the "
                "same problems with the same seed.",
            ),
            remarks=_untouched_remark(results),
        )
    said += f" (strict match); distilled without a prime, {percent(baseline.measured.strict.value)} %."
    return Answer(
        (said, _verdict(strict, len(results.strict))),
        figure=points(strict.difference),
        figure_caption=f"points: “{best.name}” against “{baseline.name}”; 95 % interval {points_interval(strict)}",
        remarks=_remarks(results, strict, len(primed)),
    )


def _answer_without_primed(results: Results) -> Answer:
    arm = results.arm(BASELINE) or next((a for a in results.arms if a.measured.n and a.name != UNTOUCHED), None)
    arm = arm or results.arm(UNTOUCHED)
    if arm is None:
        return Answer(
            (
                "No arm has predictions that could be counted.",
                "The table below says what became of each trial.",
            )
        )
    said = (
        f"Arm “{arm.name}” answers {percent(arm.measured.strict.value)} % of "
        f"{amount(arm.measured.num_problems)} test problems correctly "
        f"(strict match, 95 % interval {interval(arm.measured.strict)})."
    )
    missing = "there is no arm with a primed teacher among those that have predictions"
    return Answer(
        (said, f"What a prime is worth cannot be told from this experiment: {missing}."),
        remarks=_untouched_remark(results) if arm.name != UNTOUCHED else [],
    )


def _verdict(comparison: Comparison, num_compared: int) -> str:
    p = f"{test_name(comparison)} p {_p_in_words(comparison.p)}"
    if num_compared > 1:
        p += f", {_p_in_words(comparison.p_holm, bare=True)} corrected for {num_compared} comparisons"
    found = f"The difference of {points(comparison.difference)} points "
    found += f"(95 % interval {points_interval(comparison)}; {p}) "
    if comparison.is_clear:
        return found + (
            "is more than the choice of test problems explains."
            if comparison.difference > 0
            else "is more than the choice of test problems explains: here the prime did harm."
        )
    if comparison.low <= 0 <= comparison.high:
        return found + "cannot be told from chance: the interval holds no difference at all."
    return found + "is not clear of chance, once both tests and the number of arms are counted."


def test_name(comparison: Comparison) -> str:
    """Which test p is of."""
    return "McNemar" if comparison.num_pairs == comparison.num_problems else "sign-flip"


def _p_in_words(p: float, bare: bool = False) -> str:
    text = p_value(p)
    return text if bare and not text.startswith("<") else f"< {text[1:]}" if text.startswith("<") else f"= {text}"


def _remarks(results: Results, strict: Comparison, num_primed: int) -> list[str]:
    remarks = []
    flexible = next((c for c in results.flexible if c.arm == strict.arm), None)
    if flexible is not None:
        remark = (
            f"By flexible extract, which takes the last number in whatever form, the difference is "
            f"{points(flexible.difference)} points (95 % interval {points_interval(flexible)})."
        )
        if strict.is_clear and not flexible.is_clear:
            remark += " So the gain may be one of form: how often an answer is stated as asked."
        remarks.append(remark)
    if num_primed > 1:
        remarks.append(
            f"This is the best of {num_primed} primed arms, picked by the same test problems; "
            "the best of several looks better than it is."
        )
    for arm in results.arms:
        comparison = next((c for c in results.strict if c.arm == arm.name), None)
        if arm.kind == "control" and comparison and comparison.baseline == strict.baseline:
            remarks.append(
                f"The control “{arm.name}”, whose teacher was given another problem's answer, differs from "
                f"“{comparison.baseline.arm}” by {points(comparison.difference)} points "
                f"(95 % interval {points_interval(comparison)})."
            )
    seeds = len({trial.seed for arm in results.arms if arm.name == strict.arm for trial in arm.trials})
    if seeds == 1:
        remarks.append(
            "Each arm was trained with one seed: how much another would change is in neither interval nor p."
        )
    return remarks + _untouched_remark(results)


def _untouched_remark(results: Results) -> list[str]:
    untouched = results.arm(UNTOUCHED)
    if untouched is None:
        return []
    measured = untouched.measured
    return [
        f"The untouched student answers {percent(measured.strict.value)} % by strict match "
        f"and {percent(measured.flexible.value)} % by flexible extract."
    ]
