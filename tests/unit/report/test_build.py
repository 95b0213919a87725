"""The report of a synthetic experiment: its figures against independent calculations, and the page's structure."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from raykd.config.experiment import BASE
from raykd.errors import UserError
from raykd.report.build import CSV_COLUMNS, result_tables, write_report
from raykd.report.text import answer, duration, p_value, points
from synthetic import NUM_TEST, Experiment, drawn, full_experiment, prediction

SCRIPT = "<script>alert('x')</script>"


class Page(HTMLParser):
    """A parser that collects a page's open tags, attributes and text."""

    VOID = ("meta", "br", "hr", "img", "link", "input", "circle", "line", "rect", "path", "polyline")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes no open tag"

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def wilson_by_bisection(share: float, n: int) -> tuple[float, float]:
    """Return the proportions whose 95 % normal interval ends at `share`."""

    def bound(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            error = 1.959963984540054 * (middle * (1 - middle) / n) ** 0.5
            inside, outside = (middle, outside) if abs(middle - share) < error else (inside, middle)
        return inside

    return bound(share, 0.0), bound(share, 1.0)


def test_results_csv_matches_recomputed_numbers(tmp_path: Path) -> None:
    experiment = full_experiment(tmp_path)
    write_report(experiment.write())
    table = csv_rows(tmp_path)
    assert tuple(table[0]) == CSV_COLUMNS
    assert [(row["arm"], row["seed"]) for row in table] == [
        (BASE, "0"),
        *((arm, str(seed)) for arm in experiment.arms for seed in (0, 1)),
    ]
    for row in table:
        if row["status"] == "failed":
            continue
        answers = {
            p["problem_id"]: p for p in experiment.rows if p["trial_id"] == row["trial_id"] and not p["error"]
        }.values()
        n = len(answers)
        problem_ids = {p["problem_id"] for p in experiment.rows if p["trial_id"] == row["trial_id"]}
        assert (int(row["n"]), int(row["errors"])) == (n, len(problem_ids) - n)
        for score in ("strict", "flexible"):
            share = sum(p[f"is_correct_{score}"] for p in answers) / n
            assert float(row[f"accuracy_{score}"]) == pytest.approx(share, abs=1e-12)
            bounds = float(row[f"accuracy_{score}_low"]), float(row[f"accuracy_{score}_high"])
            assert bounds == pytest.approx(wilson_by_bisection(share, n), abs=1e-9)
        format_rate = sum("#### " in p["completion"] for p in answers) / n
        assert float(row["format_rate"]) == pytest.approx(format_rate)
        assert float(row["truncated"]) == pytest.approx(sum(p["finish_reason"] == "length" for p in answers) / n)
        assert float(row["mean_tokens"]) == pytest.approx(sum(p["num_tokens"] for p in answers) / n)
    by_trial = {row["trial_id"]: row for row in table}
    assert by_trial[BASE]["errors"] == "0"
    assert by_trial["shuffled_hint-1"]["errors"] == "1"
    trained = by_trial["none-0"]
    training_columns = ("train_rows", "train_steps", "target_tokens", "train_seconds", "loss_first", "loss_last")
    assert [trained[c] for c in training_columns] == ["480", "30", "98765", "61.5", "1.9", "0.7"]
    assert all(by_trial[BASE][column] == "" for column in training_columns)


def test_failed_trial_is_listed_with_its_error(tmp_path: Path) -> None:
    results = write_report(full_experiment(tmp_path).write())
    failed = next(row for row in csv_rows(tmp_path) if row["trial_id"] == "confidence-1")
    assert failed["status"] == "failed"
    assert (failed["accuracy_strict"], failed["n"], failed["loss_last"]) == ("", "0", "")
    for name in ("report.md", "report.html"):
        assert "CUDA out of memory" in (tmp_path / name).read_text()
    console = Console(width=200, record=True)
    console.print(*result_tables(results))
    # Brackets are shown, and not parsed as markup.
    assert "CUDA out of memory [rank 3]" in console.export_text()


def test_differences_match_recounted_pairs(tmp_path: Path) -> None:
    experiment = full_experiment(tmp_path)
    results = write_report(experiment.write())
    right = {(p["arm"], p["seed"], p["problem_id"]): p["is_correct_strict"] for p in experiment.rows if not p["error"]}
    assert [c.arm for c in results.strict] == [
        BASE,
        *(arm for arm in experiment.arms if arm != "none"),
    ]
    for comparison in results.strict:
        pairs = []
        for (arm, seed, problem), is_right in right.items():
            if arm != "none":
                continue
            other = (comparison.arm, 0 if comparison.arm == BASE else seed, problem)
            if other in right:
                pairs.append((right[other], is_right))
        assert comparison.num_pairs == len(pairs)
        assert comparison.only_arm == sum(a and not b for a, b in pairs)
        assert comparison.only_baseline == sum(b and not a for a, b in pairs)
        assert comparison.low <= comparison.difference <= comparison.high
    # Every problem has the same number of pairs, so the mean over problems is the mean over pairs.
    truth = next(c for c in results.strict if c.arm == "ground_truth")
    assert truth.difference == pytest.approx((truth.only_arm - truth.only_baseline) / truth.num_pairs)


def test_pooled_interval_counts_problems_and_not_seeds(tmp_path: Path) -> None:
    results = write_report(full_experiment(tmp_path).write())
    arm = results.arm("ground_truth")
    assert arm is not None and (arm.scores.n, arm.scores.num_problems) == (2 * NUM_TEST, NUM_TEST)
    bounds = arm.scores.strict.low, arm.scores.strict.high
    assert bounds == pytest.approx(wilson_by_bisection(arm.scores.strict.value or 0, NUM_TEST), abs=1e-9)


def test_page_is_one_file_without_external_resources(tmp_path: Path) -> None:
    write_report(full_experiment(tmp_path).write())
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href", "xlink:href")]
    assert "url(" not in html and "@import" not in html and "http" not in html
    for title in (
        "Results",
        "Accuracy by arm",
        "Accuracy and answer format",
        "Teacher and student accuracy",
        "Examples",
    ):
        assert title in page.text
    assert "Demonstration." in page.text
    assert not re.search(r"[^a-z]nan[^a-z]", page.text.lower())
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "experiment.yaml",
        "report.html",
        "report.md",
        "results.csv",
        "run.json",
    ]


def test_external_text_is_escaped(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, name=SCRIPT, commands=[f"raykd run {SCRIPT}"], versions={SCRIPT: SCRIPT})
    arm = f"arm|{SCRIPT}"
    bad = {"question": f"{SCRIPT} | how many?", "completion": f"{SCRIPT}\n#### 1"}
    experiment.trial("none", 0, [prediction("none", 0, n, n % 2 == 0, True, True, **bad) for n in range(10)])
    rows = [prediction(arm, 0, n, n % 3 == 0, True, True, **bad) for n in range(10)]
    experiment.trial("arm", 0, [row | {"trial_id": "arm-0"} for row in rows], SCRIPT, arm=arm)
    experiment.trial("lost", 0, [], status="failed", error=SCRIPT)
    experiment.completions(SCRIPT, 12, [arm])
    experiment.run["problems"]["source"] = SCRIPT
    experiment.run["stages"] = {SCRIPT: 3.0}
    experiment.write()
    (tmp_path / "experiment.yaml").write_text(f"name: x\nnote: {SCRIPT}\n")
    write_report(tmp_path)

    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    page = Page(html)
    assert "script" not in page.tags
    assert page.text.count(SCRIPT) >= 12
    markdown = (tmp_path / "report.md").read_text()
    indented = [line for line in markdown.splitlines() if "<script" in line]
    assert all(line.startswith("    ") for line in indented)
    for lines in markdown.split("\n\n"):
        if lines.startswith("| "):
            num_bars = {line.replace("\\|", "").count("|") for line in lines.splitlines()}
            assert len(num_bars) == 1, "a cell has an unescaped bar"


def two_arms(folder: Path, only_primed: int, only_none: int, both: int, neither: int) -> Experiment:
    experiment = Experiment(folder)
    sides = [(1, 0)] * only_primed + [(0, 1)] * only_none + [(1, 1)] * both + [(0, 0)] * neither
    for side, arm in enumerate(("teacher", "none")):
        rows = [prediction(arm, 0, n, bool(pair[side]), bool(pair[side]), True) for n, pair in enumerate(sides)]
        experiment.trial(arm, 0, rows, arm)
    experiment.run["problems"]["num_test"] = len(sides)
    return experiment


@pytest.mark.parametrize(
    ("counts", "words", "figure"),
    [
        ((40, 5, 30, 25), "is statistically significant.", "+35.0"),
        ((5, 40, 30, 25), "priming the teacher reduced the student's accuracy", "−35.0"),
        ((9, 7, 50, 34), "is not statistically significant (the 95 % confidence interval includes 0)", "+2.0"),
        ((0, 0, 50, 50), "is not statistically significant (the 95 % confidence interval includes 0)", "0.0"),
    ],
)
def test_verdict_follows_from_tests(tmp_path: Path, counts, words: str, figure: str) -> None:
    found = answer(write_report(two_arms(tmp_path, *counts).write()))
    assert words in found.sentences[1]
    assert found.figure == figure
    assert "95 % confidence interval" in found.sentences[1] and "McNemar p" in found.sentences[1]
    assert ("is statistically significant" in found.sentences[1]) == ("is not" not in words)
    page = Page((tmp_path / "report.html").read_text())
    assert found.sentences[1] in page.text


def test_interval_text_of_known_counts(tmp_path: Path) -> None:
    # 45 of 100: the Wilson interval is 35.6 to 54.8 percent (scipy's binomtest gives the same).
    write_report(two_arms(tmp_path, 15, 5, 30, 50).write())
    markdown = (tmp_path / "report.md").read_text()
    assert "| teacher | 0 | 45.0 (35.6–54.8) | 45.0 (35.6–54.8) | 100 | 0 | complete |" in markdown
    assert '45.0 <span class="range">(35.6–54.8)</span>' in (tmp_path / "report.html").read_text()


def test_single_arm_has_no_effect_estimate(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.trial("default", 0, drawn("default", 0, 0.5, 0.9))
    found = answer(write_report(experiment.write()))
    assert "The effect of the prompt cannot be estimated" in found.sentences[1]
    assert found.figure == ""
    assert "No arm has an unprimed baseline" in Page((tmp_path / "report.html").read_text()).text


def test_primed_arm_without_baseline_has_no_effect_estimate(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.trial("teacher", 0, drawn("teacher", 0, 0.5, 0.9), "teacher")
    found = answer(write_report(experiment.write()))
    assert "The effect of the prompt cannot be estimated" in found.sentences[1]


def test_effect_of_prompt_needs_same_other_settings(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    soft = {"targets.kind": "top_k"}
    experiment.trial("none", 0, drawn("none", 0, 0.2, 1.0))
    experiment.trial("soft", 0, drawn("soft", 0, 0.9, 1.0), "teacher", overrides={"prompt.strategy": "teacher", **soft})
    found = answer(write_report(experiment.write()))
    assert "matches this one in all other settings" in found.sentences[1]
    assert found.figure == ""
    assert "| soft | none † | +" in (tmp_path / "report.md").read_text()
    # With an unprimed arm that is equal otherwise, the effect is estimated.
    experiment.trial(
        "unprimed_soft", 0, drawn("unprimed_soft", 0, 0.7, 1.0), overrides={"prompt.strategy": "none", **soft}
    )
    found = answer(write_report(experiment.write()))
    assert "“soft” against “unprimed_soft”" in found.figure_caption
    assert "| soft | unprimed\\_soft | +" in (tmp_path / "report.md").read_text()


def test_custom_control_strategy_is_a_control(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.trial("none", 0, drawn("none", 0, 0.2, 1.0))
    experiment.trial("mine", 0, drawn("mine", 0, 0.9, 1.0), "wrong", overrides={"prompt.strategy": "wrong"})
    experiment.write()
    with (tmp_path / "experiment.yaml").open("a") as file:
        file.write("prompt: {strategies: {wrong: {text: 'It is {other_answer}.'}}}\n")
    results = write_report(tmp_path)
    assert {arm.name: arm.kind for arm in results.arms} == {"none": "baseline", "mine": "control"}
    assert "no arm with a primed teacher" in answer(results).sentences[1]


def test_teacher_interval_counts_problems_and_not_samples(tmp_path: Path) -> None:
    experiment = two_arms(tmp_path, 3, 2, 5, 5)
    experiment.completions("none", 249, ["none"])
    experiment.run["completions"][0] |= {"num_samples": 5, "errors": 0}
    low, high = (round(100 * bound, 1) for bound in wilson_by_bisection(249 / 500, 100))
    write_report(experiment.write())
    assert f"| none | 49.8 ({low}–{high}) | 500 |" in (tmp_path / "report.md").read_text()


def test_trials_of_earlier_configuration_are_excluded(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, trials=["none-0"])
    experiment.trial("none", 0, drawn("none", 0, 0.5, 0.9))
    experiment.trial("none", 7, drawn("none", 7, 0.9, 0.9))
    (tmp_path / "trials" / "teacher-3").mkdir()
    results = write_report(experiment.write())
    assert [trial.trial_id for trial in results.trials] == ["none-0"]
    assert results.arms[0].scores.n == 60
    assert results.notes == ["Excluded, of an earlier configuration of this experiment: 1 trial (none-7)"]


def test_arms_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.trial("none", 0, drawn("none", 0, 0.5, 0.9))
    experiment.trial("teacher", 1, drawn("teacher", 1, 0.5, 0.9), "teacher")
    found = answer(write_report(experiment.write()))
    assert "with the same seed" in found.sentences[1]
    assert found.figure == ""


def test_report_of_failed_trials_only(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.trial("none", 0, [], status="failed", error="", loss_first=None, rows=0, steps=0)
    results = write_report(experiment.write())
    assert "No arm has predictions" in answer(results).sentences[0]
    assert Page((tmp_path / "report.html").read_text()).open == []


def test_missing_predictions_are_noted(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.trial("none", 0, drawn("none", 0, 0.5, 0.9)[:40])
    experiment.trial("teacher", 0, [], "teacher")
    (tmp_path / "trials" / "killed-0").mkdir()
    notes = " / ".join(write_report(experiment.write()).notes)
    assert "Arm none, seed 0 has 40 of 60 predictions" in notes
    assert "Arm teacher, seed 0 has no predictions" in notes
    assert "Unfinished and therefore in no table: 1 trial (killed-0)" in notes
    for number in range(1, 5):
        (tmp_path / "trials" / f"killed-{number}").mkdir()
    (note,) = (note for note in write_report(tmp_path).notes if note.startswith("Unfinished"))
    assert note.endswith("5 trials (killed-0, killed-1, killed-2, …)")


def test_later_fields_of_run_json_are_optional(tmp_path: Path) -> None:
    experiment = two_arms(tmp_path, 3, 2, 5, 5)
    first = {"name": "bare", "commands": ["raykd run bare.yaml"], "started": "", "versions": {}}
    experiment.run = {**first, "completions": [{"strategy": "none", "arms": ["none"]}]}
    write_report(experiment.write())
    assert "bare" in (tmp_path / "report.html").read_text()


def test_folder_without_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no run\.json"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="nothing to report yet"):
        write_report(Experiment(tmp_path).write())


def test_damaged_loss_curve_is_refused(tmp_path: Path) -> None:
    experiment = two_arms(tmp_path, 3, 2, 5, 5)
    metrics = tmp_path / "trials" / "none-0" / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 1.5}\n')
    results = write_report(experiment.write())
    assert next(trial for trial in results.trials if trial.arm == "none").losses == [(1, 2.0), (3, 1.5)]
    with metrics.open("a") as file:
        file.write('{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4 is damaged"):
        write_report(tmp_path)


def test_examples_show_disagreeing_arms_first(tmp_path: Path) -> None:
    results = write_report(two_arms(tmp_path, 2, 1, 20, 20).write())
    disagreeing = [e for e in results.examples if len({r["is_correct_strict"] for r in e.predictions.values()}) == 2]
    assert len(results.examples) == 10
    assert disagreeing == results.examples[:3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(8.21), "8.2 s"),
        (duration(59.96), "1 min 00 s"),
        (duration(200), "3 min 20 s"),
        (duration(7_500), "2 h 05 min"),
        (points(-0.0001), "0.0"),
        (points(-0.031), "−3.1"),
        (p_value(0.0004), "<0.001"),
        (p_value(0.0123), "0.012"),
        (p_value(1.0), "1.00"),
    ],
)
def test_numbers_are_formatted_for_readers(text: str, expected: str) -> None:
    assert text == expected
