"""Report: an experiment's results.csv, report.md and report.html, and its table in the terminal."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from raykd import report_attention as attention
from raykd import report_cost as costs
from raykd import report_plots as plots
from raykd import report_scatter as scatter
from raykd import report_tables as tables
from raykd.measured import Share
from raykd.report_sweep import validation_share
from raykd.report_text import answer
from raykd.results import Results, read_results
from raykd.storage import write_text
from raykd.trial import Trial

# Characters of a word that a column of the terminal's table has room for.
LONGEST_WORD = 14
CSV_COLUMNS = (
    "arm",
    "seed",
    "accuracy_strict",
    "accuracy_strict_low",
    "accuracy_strict_high",
    "accuracy_flexible",
    "accuracy_flexible_low",
    "accuracy_flexible_high",
    "n",
    "errors",
    "samples",
    "majority_strict",
    "majority_flexible",
    "pass_strict",
    "pass_flexible",
    "answer_in_form",
    "answer_in_form_low",
    "answer_in_form_high",
    "right_in_form",
    "truncated",
    "truncated_low",
    "truncated_high",
    "mean_tokens",
    "mean_tokens_low",
    "mean_tokens_high",
    "repetition",
    "train_rows",
    "train_steps",
    "target_tokens",
    "train_seconds",
    "loss_first",
    "loss_last",
    "trial_id",
    "status",
)
# In a sweep's table also, and each searched field by its path.
SWEEP_COLUMNS = (
    "validation_accuracy",
    "validation_accuracy_low",
    "validation_accuracy_high",
    "validation_loss",
    "validation_n",
    "validation_number",
    "gpu_seconds",
    "adapter",
)
DEMONSTRATION = (
    "This run uses the built-in toy models or generated problems. It shows that every stage works and how a "
    "report reads. Its figures say nothing about large language models, nor what a prime is worth to them."
)


def write_report(folder: Path) -> Results:
    """Writes results.csv, report.md and report.html into an experiment's folder, each whole or not at all.

    Args:
        folder: an experiment's folder (layout: `raykd.records`).

    Returns:
        The numbers behind them.

    Raises:
        UserError: the folder is not an experiment's, or holds nothing to report yet.
    """
    results = read_results(folder)
    write_text(folder / "results.csv", _csv(results))
    if results.attention:
        write_text(folder / "attention.csv", attention.heads_csv(results.attention))
        write_text(folder / "attention_and_being_right.csv", attention.right_csv(results.attention))
    # What draws takes a second to load.
    from raykd.report_pictures import write_pictures

    write_text(folder / "report.md", _markdown(results, write_pictures(results, folder)))
    write_text(folder / "report.html", _html(results))
    return results


def result_tables(results: Results) -> list[RichTable]:
    """For the terminal: of a sweep its trials and each arm's best point; of each arm accuracy in percent with its 95 %
    interval, and n."""
    found = [each for each in (tables.all_trials(results), tables.best_points(results)) if each.rows]
    return [*(_for_terminal(each, each.title) for each in found), _for_terminal(tables.result(results), results.name)]


def _for_terminal(shown: tables.Table, title: str) -> RichTable:
    # Failures are worth a column where there are any; a terminal has no room for how a trial went.
    kept = [
        number
        for number, column in enumerate(shown.columns)
        if column not in ("Measured", "Steps", "Time")
        and (column not in ("Errors", "Failed") or any(row[number] != "0" for row in shown.rows))
    ]
    table = RichTable(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number in kept:
        column = shown.columns[number]
        # Where there is little room lines are broken between words.
        words = " ".join([column, *(row[number] for row in shown.rows)]).split()
        table.add_column(
            column,
            justify="left" if number in shown.text_columns else "right",
            min_width=min(max(map(len, words)), LONGEST_WORD),
            overflow="fold",
        )
    for row in shown.rows:
        # As Text, so that brackets in an error are not taken for markup.
        table.add_row(*(Text(row[number]) for number in kept))
    return table


def _csv(results: Results) -> str:
    text = io.StringIO()
    paths = results.sweep.paths if results.sweep else []
    columns = [*CSV_COLUMNS[:2], *paths, *CSV_COLUMNS[2:], *(SWEEP_COLUMNS if results.sweep else ())]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for trial in results.trials:
        measured = trial.measured
        row = {column: getattr(trial, column, None) for column in CSV_COLUMNS}
        row |= {name: getattr(measured, name) for name in ("n", "errors", "samples")}
        for name, value in (
            ("accuracy_strict", measured.strict),
            ("accuracy_flexible", measured.flexible),
            ("majority_strict", measured.majority_strict),
            ("majority_flexible", measured.majority_flexible),
            ("pass_strict", measured.pass_strict.get(measured.samples, Share())),
            ("pass_flexible", measured.pass_flexible.get(measured.samples, Share())),
            ("answer_in_form", measured.answer_in_form),
            ("right_in_form", measured.right_in_form),
            ("truncated", measured.truncated),
            ("mean_tokens", measured.tokens),
            ("repetition", measured.repetition),
        ):
            found = {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            row |= {column: each for column, each in found.items() if column in CSV_COLUMNS}
        if results.sweep:
            row |= {path: _cell(trial.values.get(path)) for path in paths} | _validated(trial)
        writer.writerow(row)
    return text.getvalue()


def _validated(trial: Trial) -> dict[str, Any]:
    """The columns of a trial of a sweep."""
    measured, share = trial.validation or {}, validation_share(trial)
    return {
        "validation_accuracy": share.value,
        "validation_accuracy_low": share.low,
        "validation_accuracy_high": share.high,
        "validation_loss": measured.get("loss"),
        "validation_n": measured.get("n"),
        "validation_number": measured.get("number"),
        "gpu_seconds": trial.gpu_seconds,
        "adapter": trial.adapter,
    }


def _cell(value: Any) -> Any:
    """A value of the configuration in one cell."""
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def _markdown(results: Results, pictures: list[tuple[str, str]]) -> str:
    run, found = results.run, answer(results)
    blocks = [f"# {_md(results.name)}"]
    if run.demonstration:
        blocks.append(f"> **Demonstration.** {DEMONSTRATION}")
    blocks.append(f"**{_md(found.sentences[0])}** {_md(found.sentences[1])}")
    blocks += ["\n".join(f"- {_md(line)}" for line in lines) for lines in (found.remarks, results.notes) if lines]
    blocks += [f"![{_md(title)}]({path})" for title, path in pictures]
    for table in tables.tables(results):
        blocks += [f"## {_md(table.title)}", _markdown_table(table)]
        blocks += [_md(table.note)] if table.note else []
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    blocks.append("## To repeat")
    # Indented, which makes it a code block whatever it holds.
    blocks.append("\n".join(f"    {line}" for line in run.command.splitlines()))
    made_with = f"raykd {run.raykd_version}; {versions}"
    blocks.append(f"{_md(made_with)}. Configuration: `experiment.yaml`.")
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: tables.Table) -> str:
    rule = [":--" if number in table.text_columns else "--:" for number in range(len(table.columns))]
    lines = [
        [_md(cell) for cell in table.columns],
        rule,
        *([_md(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _md(text: str) -> str:
    """Text from outside as Markdown that shows it and does nothing else."""
    for character in "\\`*_[]|#~$":
        text = text.replace(character, "\\" + character)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Names and addresses, of which some readers make links.
    text = text.replace("@", "&#64;").replace("://", "&#58;//").replace("www.", "www&#46;")
    return " ".join(text.split())


def _html(results: Results) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raykd", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        results=results,
        run=results.run,
        answer=answer(results),
        demonstration=DEMONSTRATION,
        tables=tables,
        plots=plots,
        attention=attention,
        costs=costs,
        scatter=scatter,
    )
