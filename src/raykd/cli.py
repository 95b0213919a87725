"""Command line: raykd init|plan|prompts|run|sweep|generate|train|evaluate|attention|report|compare."""

import argparse
import dataclasses
import logging
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raykd import __version__, errors, scaffold
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.display import display
from raykd.errors import UserError
from raykd.runtime.console import Output, append_to_log, make_output_safe, print_result, print_status
from raykd.storage import filesystem, lock
from raykd.storage.paths import ExperimentPaths, StoragePaths

# Width of tables that are written to a file or a pipe.
LOG_WIDTH = 160
_EPILOG = """\
FILE is an experiment's YAML file, or the name of a configuration that raykd ships:

  {configs}

Set any of its fields on the command line:

  raykd run quickstart name=mine train.learning_rate=3e-4 'seeds=[0, 1, 2]'

The stages `generate`, `train`, `evaluate` and `attention` run one step of `run` in the same folders. Completed work is
skipped: re-run the same command to resume an interrupted one. Set RAY_ADDRESS to run on a Ray cluster; without it a
command runs on this machine.
"""

_STAGES = {
    "plan": "show how the arms differ and estimate memory, placement and cost; exits with 2 if a stage does not fit",
    "prompts": "show the teacher's and the student's prompts for a problem, with token counts",
    "run": "run the whole experiment, from problems to report",
    "sweep": "run an experiment with a section `sweep`: search hyperparameters, select by validation, test the best",
    "generate": "generate the primed teacher's completions of the training problems",
    "train": "train the students, one Ray Tune trial for each arm and seed",
    "evaluate": "answer the test problems with all students in one engine",
    "attention": "measure the students' attention heads on the same solutions",
    "report": "write results.csv, report.md and report.html of a finished experiment",
}

# The fields of `planning.cost.Rates` that can be typed, each with its option and what it means.
_RATES = {
    "generation": ("--generation-rate", "completion tokens per second of one teacher replica"),
    "training": ("--training-rate", "target tokens per second of one training worker"),
    "evaluation": ("--eval-rate", "tokens per second of the students' engine"),
    "completion_tokens": ("--completion-tokens", "mean tokens of a teacher's completion"),
    "answer_tokens": ("--answer-tokens", "mean tokens of a student's answer"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program; None for that of this process.

    Returns:
        the exit status: 0 for success, 1 for an error or a failed trial, 2 for invalid input, 128 + N for signal N.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse_options(arguments)
    command = shlex.join(["raykd", *arguments])
    # vLLM logs on import. The engines run in other processes, which set their own level.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    make_output_safe()
    try:
        return _run_command(options, command)
    finally:
        Output(sys.stdout).flush()


def _run_command(options: argparse.Namespace, command: str) -> int:
    folder = None
    try:
        if options.stage == "compare":
            return _compare(options)
        if options.stage == "init":
            return scaffold.init(options)
        if options.stage == "report":
            return _report(options, command)
        experiment = load_experiment(scaffold.find_config(options.file), options.overrides)
        if options.stage in ("plan", "prompts"):
            return _preview(options, experiment)
        if options.stage == "sweep" and experiment.sweep is None:
            raise UserError(f"{options.file}: has no section `sweep`; add one, or use `raykd run`")
        folder = _folder(experiment)
        if filesystem.is_read_only(folder):
            return _show_complete(options.stage, experiment, folder)
        with lock.folder_lock(folder, command, show=print_status):
            return _run_stage(options.stage, experiment, command, getattr(options, "retry_failed", False))
    except KeyboardInterrupt as interrupt:
        print_status(f"raykd: interrupted; re-run to resume: {command}")
        return getattr(interrupt, "status", 130)
    except Exception as error:
        return _report_error(error, folder)


def _parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, with overrides before and after options; argparse alone rejects those after them."""
    parser = _parser()
    options, unparsed = parser.parse_known_args(arguments)
    if unknown := [each for each in unparsed if each.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unparsed:
        options.overrides = [*options.overrides, *unparsed]
    return options


def _report_error(error: Exception, folder: Path | None) -> int:
    """Print an exception on one line, write its traceback to the log, and return the exit status.

    Args:
        error: the exception that ended the command.
        folder: the experiment's folder, which holds the log; None if no stage had started.
    """
    reported = errors.reported_error(error)
    if isinstance(reported, UserError):
        print_status(f"raykd: {display(reported)}")
        return 2
    os_error = errors.os_error_message(error)
    if os_error:
        line = f"a file cannot be read or written: {os_error}; free disk space, fix the permissions or change `storage`"
    elif reported:
        line = str(reported)
    elif errors.is_cluster_error(error):
        line = errors.root_cause(error)
    else:
        # A bug of raykd or of a library.
        line = f"unexpected error: {type(error).__name__}: {error}"
    text, hint = "".join(traceback.format_exception(error)), ""
    if folder:
        log = append_to_log(ExperimentPaths(folder).log, text)
        hint = ". Completed work is saved; re-run to resume" + (f". Log: {log}" if log else "")
    elif not os_error and not reported:
        print_status(text.rstrip())
    print_status(f"raykd: {display(line)}{hint}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raykd",
        description="Distill a language model on Ray, and measure the effect of the teacher's prompt.",
        epilog=_EPILOG.format(configs="\n  ".join(scaffold.shipped_configs())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raykd {__version__}")
    stages = parser.add_subparsers(dest="stage", metavar="COMMAND", required=True)
    for name, text in _STAGES.items():
        stage = stages.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        file_help = "the experiment's YAML file, or the name of a shipped configuration"
        if name == "report":
            file_help += ", or the experiment's folder, storage/experiments/NAME"
        stage.add_argument("file", metavar="FILE", help=file_help)
        if name == "prompts":
            stage.add_argument("--problem", default="0", metavar="N", help="index or id of a training problem (0)")
        if name == "plan":
            _add_plan(stage)
        if name == "sweep":
            stage.add_argument("--retry-failed", action="store_true", help="retry failed trials")
        overrides_help = "fields to set, values as YAML"
        stage.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=overrides_help)
    scaffold.add_parser(stages)
    compare = stages.add_parser(
        "compare",
        help="compare the test answers of two students",
        description="Compare the answers of two students to the same test problems: the counts, the paired "
        "difference, and the problems that only one of them solves, with both answers. RUN is an experiment's folder, "
        "FOLDER:ARM if it has several arms, or FOLDER:ARM:SEED for one seed.",
    )
    for name in ("first", "second"):
        compare.add_argument(name, metavar="RUN", help="storage/experiments/NAME[:ARM[:SEED]]")
    compare.add_argument("--score", choices=("strict", "flexible"), default="strict", help="answer extraction (strict)")
    compare.add_argument(
        "--limit", type=int, default=10, metavar="N", help="problems to show of each kind; 0 for all (10)"
    )
    return parser


def _add_plan(stage: argparse.ArgumentParser) -> None:
    cluster_help = "the cluster to fit: a `ray up` file, or `live` for the running cluster at RAY_ADDRESS"
    stage.add_argument("--cluster", metavar="FILE", help=cluster_help)
    stage.add_argument("--rates-from", metavar="RUN", help="folder of an earlier run; use its measured rates")
    for name, (option, text) in _RATES.items():
        stage.add_argument(option, dest=name, type=float, metavar="N", help=text)


def _compare(options: argparse.Namespace) -> int:
    from raykd.report.compare_runs import compare

    print_result(compare(options.first, options.second, options.score, options.limit or None))
    return 0


def _preview(options: argparse.Namespace, experiment: Experiment) -> int:
    from raykd.planning.preview import arms_table, describe_search, render_prompts

    if options.stage == "plan":
        search = describe_search(experiment)
        _console().print(arms_table(experiment))
        if search:
            print_result(search)
        _show_requirements(options, experiment)
    else:
        print_result(render_prompts(experiment, options.problem))
    return 0


def _show_requirements(options: argparse.Namespace, experiment: Experiment) -> None:
    """Print an experiment's memory, placement and cost; raise UserError if a stage does not fit."""

    from raykd.cluster.nodes import from_ray, read_cluster_file
    from raykd.planning import cost
    from raykd.planning.tables import plan_tables

    cluster = None
    if options.cluster:
        cluster = from_ray(_live_nodes()) if options.cluster == "live" else read_cluster_file(Path(options.cluster))
    rates = cost.measured_rates(filesystem.resolve(options.rates_from)) if options.rates_from else cost.Rates()
    tables, misfit = plan_tables(experiment, cluster, dataclasses.replace(rates, **_given_rates(options)))
    console = _console()
    for table in tables:
        console.print(table)
    if misfit:
        raise UserError(f"{options.file} does not fit: {misfit}")


def _console() -> Any:
    """Return a rich console as wide as the terminal, or wide enough for the tables in a log."""
    from raykd.runtime.rich_console import SafeConsole

    return SafeConsole(sys.stdout, width=None if sys.stdout.isatty() else LOG_WIDTH)


def _given_rates(options: argparse.Namespace) -> dict[str, float]:
    """Return the rates on the command line, by the fields of `planning.cost.Rates`.

    Raises:
        UserError: if one is not a positive number.
    """
    rates = {name: value for name in _RATES if (value := getattr(options, name)) is not None}
    if invalid := [f"{_RATES[name][0]} {rate:g}" for name, rate in rates.items() if not 0 < rate < math.inf]:
        raise UserError(f"{', '.join(invalid)}: should be above 0")
    return rates


def _live_nodes() -> list[dict[str, Any]]:
    """Return the nodes of the cluster at RAY_ADDRESS.

    As for the stages, RAY_ADDRESS must be set: another cluster that runs on this machine is not joined.

    Raises:
        UserError: if there is no such cluster.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError("--cluster live: set RAY_ADDRESS to its address, or to auto for a cluster on this machine")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    # Ray raises ValueError for a malformed address.
    except (ConnectionError, ValueError):
        raise UserError(f"--cluster live: no Ray cluster at RAY_ADDRESS={address}") from None
    try:
        return ray.nodes()
    finally:
        ray.shutdown()


def _run_stage(stage: str, experiment: Experiment, command: str, retry_failed: bool) -> int:
    # torch and Ray take seconds to import: a typing error in the experiment is reported without them.
    from raykd.cluster.connection import connected
    from raykd.pipeline import run
    from raykd.pipeline.plan import resolve

    if stage in ("run", "sweep"):
        run.run_experiment(experiment, command, retry_failed, stage)
    else:
        plan = resolve(experiment)
        steps: dict[str, Callable[..., Any]] = {
            "generate": run.generate_completions,
            "train": run.train_students,
            "evaluate": run.make_predictions,
            "attention": run.measure_attention,
        }
        if plan.is_complete([stage]):
            run.start(plan, command)
        else:
            with connected(plan.log, experiment.name, stage) as resources:
                run.check_and_start(plan, command, resources, [stage])
                steps[stage](plan, resources)
        run.record_results(plan)
        failed = {} if stage == "generate" else plan.failed_trials()
        for trial_id, error in failed.items():
            print_status(f"trial {trial_id} failed: {error}")
        print_status(f"{stage}: done{f', but {len(failed)} trials failed' if failed else ''}; {plan.folder}")
        return 1 if failed else 0
    return _show_results(_folder(experiment))


def _show_complete(stage: str, experiment: Experiment, folder: Path) -> int:
    """Print the results of an experiment in a storage that cannot be written; raise UserError if it is not complete."""
    from raykd.pipeline.plan import STAGES, resolve

    if not resolve(experiment).is_complete(STAGES if stage in ("run", "sweep") else [stage]):
        raise UserError(f"{folder} cannot be written, and {stage} is not complete: set another `storage`, or copy it")
    return _show_read_only(folder)


def _show_read_only(folder: Path) -> int:
    print_status(f"{folder} cannot be written: its report stays as it is")
    return _show_results(folder)


def _report(options: argparse.Namespace, command: str) -> int:
    """Render a finished experiment from its folder alone, without its models and without Ray."""
    folder = _report_folder(options.file, options.overrides)
    if not filesystem.is_remote(folder) and not folder.is_dir():
        raise UserError(f"{folder}: no such folder, nothing to report yet; run the experiment first with `raykd run`")
    from raykd.report.build import write_report

    if filesystem.is_read_only(folder):
        return _show_read_only(folder)
    with lock.folder_lock(folder, command):
        write_report(folder)
        return _show_results(folder)


def _report_folder(file: str, overrides: Sequence[str]) -> Path:
    """Return the folder of the experiment to report, given as that folder or as the experiment's YAML file."""
    if "://" in file or Path(file).is_dir():
        if overrides:
            raise UserError(f"{overrides[0]!r}: {file} is a folder; fields can be set only if FILE is a YAML file")
        return filesystem.resolve(file)
    experiment = load_experiment(scaffold.find_config(file), overrides)
    folder = _folder(experiment)
    # The folder may hold another experiment of the same name.
    from raykd.pipeline import run_record

    run_record.check_compatible(experiment, folder)
    return folder


def _folder(experiment: Experiment) -> Path:
    return StoragePaths(filesystem.resolve(experiment.storage)).experiment(experiment.name)


def _show_results(folder: Path) -> int:
    """Print the result tables, and return the exit status: 1 if a trial failed."""
    from raykd.report.build import result_tables
    from raykd.report.results import read_results

    results = read_results(folder, with_attention=False)
    console = _console()
    for table in result_tables(results):
        console.print(table)
    console.print(f"report: {ExperimentPaths(folder).report_html}", soft_wrap=True)
    return 1 if any(trial.status == "failed" for trial in results.trials) else 0


if __name__ == "__main__":
    sys.exit(main())
