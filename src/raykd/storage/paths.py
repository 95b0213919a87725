"""Paths: the layout of the storage folder, of an experiment's folder and of a trial's folder.

Every file name that a run writes is defined here and nowhere else.
"""

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")
LOCK_FILE = "run.lock"
"""The lock of an experiment's folder, or of a set of completions, while a run works on it."""
TRIAL_FILE = "trial.json"
"""A trial's status and totals, written last."""
METRICS_FILE = "metrics.jsonl"
"""A trial's loss curve, a point a line."""
NULL_ADAPTER = "null_adapter"
"""An adapter of zeros beside students' answers, with which an engine answers as the base student."""
STAGE_TIME_FILE = "seconds.json"
"""The seconds spent so far on a set of completions, beside its rows."""


def split_file(problems: Path, split: str) -> Path:
    """Return the Parquet file of one split.

    Args:
        problems: the folder of the splits (`StoragePaths.problems`).
        split: `train`, `validation` or `test`.
    """
    return problems / f"{split}.parquet"


@dataclass(frozen=True)
class StoragePaths:
    """The storage folder, which experiments share.

    ```
    <storage>/
        problems/<key>/       train.parquet, validation.parquet, test.parquet, manifest.json
        completions/<key>/    part-*.parquet, manifest.json, seconds.json; run.lock during a run
        experiments/<name>/   see `ExperimentPaths`
    ```
    """

    root: Path

    def problems(self, key: str) -> Path:
        """Return the folder of the splits with a content key."""
        return self.root / "problems" / key

    @property
    def completions(self) -> Path:
        """The folder of all sets of completions, each in a folder named by its content key."""
        return self.root / "completions"

    def experiment(self, name: str) -> Path:
        """Return the folder of an experiment."""
        return self.root / "experiments" / name


@dataclass(frozen=True)
class ExperimentPaths:
    """An experiment's folder.

    ```
    <storage>/experiments/<name>/
        experiment.yaml           the resolved configuration
        run.json                  the run record: versions, models, seeds, counts, times
        driver.log                output of the libraries, and tracebacks
        run.lock                  the lock; only during a run
        trials/<trial_id>/        see `TrialPaths`
        checkpoints/<trial_id>/   Ray Train's checkpoints; removed when the trial is complete
        tune/                     Ray Tune's own records
        points/<key>/<arm>.json   the points that a search has drawn
        predictions/<key>/        the students' answers: part-*.parquet, manifest.json; null_adapter/
        attention/<key>/          statistics of the attention heads: part-*.parquet, manifest.json
        lm_eval/                  the test split as a task of lm-evaluation-harness
        mlflow.db, wandb/         written by the tracker of that name, where no server is set
        predictions.parquet       the answers of all complete folders of predictions
        results.csv, attention.csv, attention_correctness.csv
        report.md, report.html
        report/                   the figures of report.md
    ```
    """

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "experiment.yaml"

    @property
    def run_record(self) -> Path:
        """What the run recorded about itself."""
        return self.folder / "run.json"

    @property
    def log(self) -> Path:
        """The output of the libraries, and tracebacks."""
        return self.folder / "driver.log"

    @property
    def lock(self) -> Path:
        """The lock of the experiment."""
        return self.folder / LOCK_FILE

    @property
    def trials(self) -> Path:
        """The folder of all trials."""
        return self.folder / "trials"

    def trial(self, trial_id: str) -> Path:
        """Return the folder of a trial."""
        return self.trials / trial_id

    @property
    def checkpoints(self) -> Path:
        """The folder of the trials' checkpoints."""
        return self.folder / "checkpoints"

    @property
    def tune(self) -> Path:
        """The folder of Ray Tune's own records."""
        return self.folder / "tune"

    @property
    def points(self) -> Path:
        """The folder of the points that searches have drawn."""
        return self.folder / "points"

    def points_file(self, key: str, arm: str) -> Path:
        """Return the file of an arm's points in the search with a content key."""
        return self.points / key / f"{arm}.json"

    @property
    def predictions(self) -> Path:
        """The folder of the students' answers, with a folder for each evaluation setting."""
        return self.folder / "predictions"

    @property
    def attention(self) -> Path:
        """The folder of the attention statistics, with a folder for each setting."""
        return self.folder / "attention"

    @property
    def lm_eval(self) -> Path:
        """The folder of the task of lm-evaluation-harness."""
        return self.folder / "lm_eval"

    @property
    def mlflow_db(self) -> Path:
        """The SQLite database that MLflow logs to where no server is set."""
        return self.folder / "mlflow.db"

    @property
    def wandb(self) -> Path:
        """The folder that Weights & Biases logs to where no server is set."""
        return self.folder / "wandb"

    @property
    def all_predictions(self) -> Path:
        """The answers of all complete folders of predictions in one file."""
        return self.folder / "predictions.parquet"

    @property
    def results_csv(self) -> Path:
        """The results, a row for each trial."""
        return self.folder / "results.csv"

    @property
    def attention_csv(self) -> Path:
        """The statistics of each attention head in each arm."""
        return self.folder / "attention.csv"

    @property
    def attention_correctness_csv(self) -> Path:
        """The correlation of each head's statistics with correct answers."""
        return self.folder / "attention_correctness.csv"

    @property
    def report_md(self) -> Path:
        """The report as Markdown."""
        return self.folder / "report.md"

    @property
    def report_html(self) -> Path:
        """The report as one HTML file."""
        return self.folder / "report.html"

    @property
    def figures(self) -> Path:
        """The folder of the figures of `report_md`."""
        return self.folder / "report"


@dataclass(frozen=True)
class TrialPaths:
    """A trial's folder.

    ```
    <storage>/experiments/<name>/trials/<trial_id>/
        adapter/         the LoRA weights, as PEFT writes them
        metrics.jsonl    the loss curve, a point a line
        trial.json       status and totals, written last
        rounds/<n>/      on-policy training only, see `RoundPaths`
    ```
    """

    folder: Path

    @property
    def adapter(self) -> Path:
        """The folder of the LoRA weights."""
        return self.folder / "adapter"

    @property
    def metrics(self) -> Path:
        """The loss curve."""
        return self.folder / METRICS_FILE

    @property
    def record(self) -> Path:
        """The trial's status and totals, written last."""
        return self.folder / TRIAL_FILE

    def round(self, number: int) -> Path:
        """Return the folder of a round, counted from 0."""
        return self.folder / "rounds" / str(number)


@dataclass(frozen=True)
class RoundPaths:
    """The folder of one round of on-policy training.

    ```
    <storage>/experiments/<name>/trials/<trial_id>/rounds/<n>/
        answers/        the student's rollouts: part-*.parquet, manifest.json
        completions/    the same with the teacher's targets: part-*.parquet, manifest.json, seconds.json
        adapter/        the weights at the end of the round; the last round's are the trial's
        round.json      counts, written last; for the last round trial.json instead
    ```
    """

    folder: Path

    @property
    def answers(self) -> Path:
        """The folder of the student's rollouts."""
        return self.folder / "answers"

    @property
    def completions(self) -> Path:
        """The folder of the rollouts with the teacher's targets."""
        return self.folder / "completions"

    @property
    def adapter(self) -> Path:
        """The folder of the LoRA weights at the end of the round."""
        return self.folder / "adapter"

    @property
    def record(self) -> Path:
        """The round's counts, written last."""
        return self.folder / "round.json"
