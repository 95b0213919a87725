"""Report text: numbers as text, and the experiment's main result in sentences."""

from dataclasses import dataclass, field

from raykd.analysis.comparison import BASELINE, Comparison
from raykd.analysis.scores import MeanCI, Proportion
from raykd.config.experiment import BASE
from raykd.report.results import Results

NOTHING = "–"


@dataclass(frozen=True)
class Answer:
    """The experiment's main result: a number, two sentences and remarks on its limits."""

    sentences: tuple[str, str]
    figure: str = ""
    """The number, in percentage points; empty where there is none."""
    figure_caption: str = ""
    remarks: list[str] = field(default_factory=list)


def percent(share: float | None) -> str:
    """Return a share in percent with one decimal, without the percent sign."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    if difference is None:
        return NOTHING
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def interval(share: Proportion) -> str:
    """Return the confidence interval of a share, in percent."""
    return NOTHING if share.low is None else f"{percent(share.low)}–{percent(share.high)}"


def share_and_interval(share: Proportion) -> str:
    """Return a share and its interval, in percent: `61.3 (55.7–66.7)`."""
    return NOTHING if share.value is None else f"{percent(share.value)} ({interval(share)})"


def mean_and_interval(mean: MeanCI, unit: float = 1) -> str:
    """Return a mean and its interval, multiplied by `unit`: `61.3 (55.7–66.7)`."""
    if mean.value is None:
        return NOTHING
    value = amount(unit * mean.value, 1)
    if mean.low is None or mean.high is None:
        return value
    return f"{value} ({amount(unit * mean.low, 1)}–{amount(unit * mean.high, 1)})"


def points_interval(comparison: Comparison) -> str:
    """Return the confidence interval of a difference, in percentage points."""
    return f"{points(comparison.low)} to {points(comparison.high)}"


def points_and_interval(comparison: Comparison) -> str:
    """Return a difference and its interval, in percentage points: `+3.0 (−1.2 to +7.1)`."""
    return f"{points(comparison.difference)} ({points_interval(comparison)})"


def baseline_name(comparison: Comparison) -> str:
    """Return the name of the baseline, marked with † where more than the prompt differs."""
    return comparison.baseline.arm if comparison.baseline.only_prompt_differs else f"{comparison.baseline.arm} †"


def p_value(p: float) -> str:
    """Return a p-value with two or three decimals; `<0.001` below 0.001."""
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def amount(value: float | None, decimals: int = 0) -> str:
    """Return a count or a mean, with thousands separators."""
    return NOTHING if value is None else f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Return seconds as text: `8.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def answer(results: Results) -> Answer:
    """Return the result of the best primed arm against its unprimed baseline.

    Only an arm that differs from its baseline in the prompt alone can show the effect of the prompt, so such an arm is
    preferred to a better one without.
    """
    primed = [arm for arm in results.arms if arm.kind == "primed" and arm.scores.n]
    if not primed:
        return _answer_without_primed(results)
    comparisons = {
        comparison.arm: comparison for comparison in results.strict if comparison.baseline.only_prompt_differs
    }
    comparable = [arm for arm in primed if arm.name in comparisons]
    best = max(comparable or primed, key=lambda arm: arm.scores.strict.value or 0.0)
    accuracy = best.scores.strict
    first = (
        f"The student distilled from a teacher primed with “{best.strategy}” answers {percent(accuracy.value)} % of "
        f"{amount(best.scores.num_problems)} test problems correctly"
    )
    comparison = comparisons.get(best.name)
    baseline = results.arm(comparison.baseline.arm) if comparison else None
    if comparison is None or baseline is None:
        return Answer(
            (
                f"{first} (strict match, 95 % confidence interval {interval(accuracy)}).",
                "The effect of the prompt cannot be estimated: no unprimed arm with the same seed and problems matches "
                "this one in all other settings.",
            ),
            remarks=_base_remarks(results),
        )
    unprimed = percent(baseline.scores.strict.value)
    return Answer(
        (
            f"{first}; the student of the unprimed teacher answers {unprimed} % (strict match).",
            _verdict(comparison, len(results.strict)),
        ),
        figure=points(comparison.difference),
        figure_caption=(
            f"percentage points: “{best.name}” against “{baseline.name}”; 95 % confidence interval "
            f"{points_interval(comparison)}"
        ),
        remarks=_remarks(results, comparison, len(primed)),
    )


def _answer_without_primed(results: Results) -> Answer:
    trained = [arm for arm in results.arms if arm.scores.n and arm.name != BASE]
    arm = results.arm(BASELINE) or (trained[0] if trained else results.arm(BASE))
    if arm is None:
        return Answer(("No arm has predictions to score.", "The table below shows the status of each trial."))
    sentence = (
        f"The student of arm “{arm.name}” answers {percent(arm.scores.strict.value)} % of "
        f"{amount(arm.scores.num_problems)} test problems correctly "
        f"(strict match, 95 % confidence interval {interval(arm.scores.strict)})."
    )
    return Answer(
        (sentence, "The effect of the prompt cannot be estimated: no arm with a primed teacher has predictions."),
        remarks=_base_remarks(results) if arm.name != BASE else [],
    )


def _verdict(comparison: Comparison, num_comparisons: int) -> str:
    tests = f"{test_name(comparison)} {p_with_relation(comparison.p)}"
    if num_comparisons > 1:
        tests += f", {p_with_relation(comparison.p_holm)} corrected for {num_comparisons} comparisons"
    difference = (
        f"The difference of {points(comparison.difference)} percentage points "
        f"(95 % confidence interval {points_interval(comparison)}; {tests})"
    )
    if comparison.is_significant and comparison.difference > 0:
        return f"{difference} is statistically significant."
    if comparison.is_significant:
        return f"{difference} is statistically significant: priming the teacher reduced the student's accuracy."
    if comparison.low <= 0 <= comparison.high:
        return f"{difference} is not statistically significant (the 95 % confidence interval includes 0)."
    return f"{difference} is not statistically significant (the corrected p is 0.05 or more)."


def test_name(comparison: Comparison) -> str:
    """Return the name of the test that p is from."""
    return "McNemar" if comparison.num_pairs == comparison.num_problems else "sign-flip"


def p_with_relation(p: float) -> str:
    """Return a p-value for a sentence: `p = 0.021`, `p < 0.001`."""
    text = p_value(p)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def _remarks(results: Results, strict: Comparison, num_primed: int) -> list[str]:
    remarks = []
    flexible = next((flexible for flexible in results.flexible if flexible.arm == strict.arm), None)
    if flexible is not None:
        remark = (
            f"By flexible extract (the last number in the answer, in any format), the difference is "
            f"{points(flexible.difference)} percentage points (95 % confidence interval {points_interval(flexible)})."
        )
        if strict.is_significant and not flexible.is_significant:
            remark += " The effect may therefore be one of answer format alone."
        remarks.append(remark)
    if num_primed > 1:
        remarks.append(
            f"This arm is the best of {num_primed} primed arms, selected on the same test problems. Its accuracy is "
            "therefore biased upward."
        )
    for arm in results.arms:
        comparison = next((comparison for comparison in results.strict if comparison.arm == arm.name), None)
        if arm.kind == "control" and comparison and comparison.baseline == strict.baseline:
            remarks.append(
                f"The control arm “{arm.name}”, whose teacher received another problem's answer, differs from "
                f"“{comparison.baseline.arm}” by {points(comparison.difference)} percentage points "
                f"(95 % confidence interval {points_interval(comparison)})."
            )
    seeds = {trial.seed for arm in results.arms if arm.name == strict.arm for trial in arm.trials}
    if len(seeds) == 1:
        remarks.append(
            "Each arm was trained with one seed, so neither the interval nor p includes variation between training "
            "seeds."
        )
    return remarks + _base_remarks(results)


def _base_remarks(results: Results) -> list[str]:
    base = results.arm(BASE)
    if base is None:
        return []
    return [
        f"The base student (no adapter) answers {percent(base.scores.strict.value)} % correctly by strict match and "
        f"{percent(base.scores.flexible.value)} % by flexible extract."
    ]
