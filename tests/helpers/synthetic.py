"""Synthetic experiments: folders with random rows from a seed, for tests of analysis and report."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa

from raykd.config.experiment import BASE
from raykd.report.attention import NAMES
from raykd.storage.files import write_json
from raykd.storage.row_store import finalize, write_part
from raykd.storage.schemas import ATTENTION, PREDICTION

STATISTICS = tuple(NAMES)

NUM_TEST = 60
DIGEST = "0" * 20


def prediction(arm: str, seed: int, number: int, strict: bool, flexible: bool, has_format: bool, **more) -> dict:
    trial_id = arm if arm == BASE else f"{arm}-{seed}"
    answer = str(number) if strict or flexible else "0"
    return {
        "prediction_id": f"{trial_id}/{number}",
        "trial_id": trial_id,
        "arm": arm,
        "seed": seed,
        "adapter_digest": "" if arm == BASE else DIGEST,
        "protocol": "zero_shot_chat",
        "problem_id": f"problem-{number:03}",
        "sample_index": 0,
        "question": f"Ada has {number} apples and buys {number} more. How many apples does she have, a < b & c?",
        "reference_answer": str(number),
        "completion": f"Ada has them.\n{'#### ' if has_format else 'So it is '}{answer}",
        "num_tokens": 20 + number,
        "finish_reason": "stop",
        "answer_strict": answer if has_format else None,
        "answer_flexible": answer,
        "is_correct_strict": strict,
        "is_correct_flexible": flexible,
        "error": "",
    } | more


def drawn(arm: str, seed: int, share: float, format_rate: float, num_test: int = NUM_TEST) -> list[dict]:
    """Return predictions with random correctness, format and length."""
    draw = random.Random(f"{arm}{seed}")
    rows = []
    for number in range(num_test):
        is_correct, has_format = draw.random() < share, draw.random() < format_rate
        is_truncated = not has_format and draw.random() < 0.7
        row = prediction(arm, seed, number, is_correct and has_format, is_correct, has_format)
        rows.append(row | {"finish_reason": "length" if is_truncated else "stop", "num_tokens": draw.randint(40, 300)})
    return rows


class Experiment:
    """A synthetic experiment's folder."""

    def __init__(self, folder: Path, **run) -> None:
        self.folder = folder
        self.rows: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.arms: list[str] = []
        self.run = {
            "name": "primes-at-small-scale",
            "raykd_version": "0.1.0",
            "commands": ["raykd run configs/gsm8k/primes.yaml"],
            "started": "2026-03-01T09:30:00+00:00",
            "versions": {"torch": "2.13.0", "ray": "2.60.0"},
            "python": "3.11.9",
            "platform": "Linux-x86_64",
            "seeds": [0],
            "demonstration": False,
            "completions": [],
            "problems": {"source": "gsm8k", "num_train": 500, "num_validation": 0, "num_test": NUM_TEST},
            "stages": {"generate": 812.4, "train": 4210.0, "evaluate": 95.2},
        } | run

    def trial(self, name: str, seed: int, answers: list[dict], strategy: str = "none", **more) -> None:
        folder = self.folder / "trials" / f"{name}-{seed}"
        record = {
            "trial_id": f"{name}-{seed}",
            "arm": name,
            "seed": seed,
            "overrides": {},
            "strategy": strategy,
            "status": "complete",
            "error": "",
            "rows": 480,
            "dropped": {"too long": 3, "wrong": 0},
            "steps": 30,
            "target_tokens": 98_765,
            "seconds": 61.5,
            "loss_first": 1.9,
            "loss_last": 0.7,
            "adapter": "adapter",
            "adapter_digest": DIGEST,
        } | more
        write_json_into(folder / "trial.json", record)
        lines = [
            {"step": step, "epoch": 0, "loss": 0.7 + 1.2 * 0.88**step + 0.04 * ((step * 7 + seed) % 5)}
            for step in range(1, 31)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.arms += [name] if name not in self.arms else []
        self.rows += answers

    def completions(self, strategy: str, correct: int | None, arms: list[str]) -> None:
        self.run["completions"].append(
            {
                "strategy": strategy,
                "content_keys": [f"key-{strategy}"],
                "rows": 500,
                "errors": 2,
                "correct": correct,
                "completion_tokens": 91_234,
                "seconds": 270.8,
                "teacher": "a-teacher-70b",
                "arms": arms,
                "truncated": 7,
            }
        )

    def attention(self, trials: dict[str, tuple[str, int]], num_problems: int = 12, shape=(3, 2)) -> None:
        """Write random attention statistics of some trials (arm and seed by id): layers by heads."""
        folder = self.folder / "attention" / "key"
        for trial_id, (arm, seed) in trials.items():
            draw = np.random.default_rng(sum(map(ord, trial_id)))
            rows = []
            for number in range(num_problems):
                values = draw.random((len(STATISTICS), *shape), dtype=np.float32) + 0.5 * (arm == "ground_truth")
                # This statistic is undefined in the first layer.
                values[-1, 0] = np.nan
                row = {"attention_id": f"{trial_id}/{number}", "trial_id": trial_id, "arm": arm, "seed": seed}
                row["adapter_digest"] = "" if arm == BASE else DIGEST
                row |= {"problem_id": f"problem-{number:03}", "num_tokens": 9, "values": values.ravel(), "error": ""}
                rows.append(row)
            write_part(folder, pa.Table.from_pylist(rows, schema=ATTENTION))
        manifest = {"statistics": list(STATISTICS), "layers": shape[0], "heads": shape[1]}
        manifest["trials"] = {name: "" if arm == BASE else DIGEST for name, (arm, _) in trials.items()}
        finalize(folder, ATTENTION, "attention_id", manifest)
        self.run["attention"] = "attention/key"

    def write(self) -> Path:
        arms = "".join(f"  {arm}: {{}}\n" for arm in self.arms)
        (self.folder / "experiment.yaml").write_text(f"name: primes-at-small-scale\narms:\n{arms}")
        write_json(self.folder / "run.json", self.run)
        predictions = self.folder / "predictions"
        predictions.mkdir(exist_ok=True)
        for start in range(0, len(self.rows), 50):
            write_part(predictions, pa.Table.from_pylist(self.rows[start : start + 50], schema=PREDICTION))
        return self.folder


def write_json_into(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def full_experiment(folder: Path, num_test: int = NUM_TEST) -> Experiment:
    """The base student, reference, none, three primes, a control and a failed trial, two seeds each."""
    run = {"seeds": [0, 1], "demonstration": True, "problems": {"source": "demo", "num_test": num_test}}
    experiment = Experiment(folder, **run)
    experiment.rows += drawn(BASE, 0, 0.35, 0.3, num_test)
    arms = {
        "reference": ("none", 0.45, 0.95, {"targets.source": "reference"}),
        "none": ("none", 0.5, 0.7, {}),
        "teacher": ("teacher", 0.6, 0.85, {"prompt.strategy": "teacher"}),
        "ground_truth": ("ground_truth", 0.62, 0.97, {"prompt.strategy": "ground_truth"}),
        "confidence": ("confidence", 0.55, 0.8, {"prompt.strategy": "confidence"}),
        "shuffled_hint": ("shuffled_hint", 0.42, 0.75, {"prompt.strategy": "shuffled_hint"}),
    }
    for arm, (strategy, share, format_rate, overrides) in arms.items():
        for seed in (0, 1):
            if (arm, seed) == ("confidence", 1):
                message = "CUDA out of memory [rank 3]\nTraceback …"
                failed = {"status": "failed", "error": message, "loss_last": None, "steps": 0}
                experiment.trial(arm, seed, [], strategy, overrides=overrides, **failed)
            else:
                rows = drawn(arm, seed, share, format_rate, num_test)
                experiment.trial(arm, seed, rows, strategy, overrides=overrides)
    for strategy, correct in (("none", 401), ("teacher", 420), ("ground_truth", 433), ("confidence", 428)):
        experiment.completions(strategy, correct, [strategy])
    experiment.completions("shuffled_hint", 210, ["shuffled_hint"])
    # One request that failed twice, and one that failed once and was answered later.
    experiment.rows[-1] |= {"error": "the engine died", "completion": "", "answer_strict": None}
    repeated = dict(experiment.rows[3])
    experiment.rows.insert(0, repeated | {"error": "timed out", "is_correct_strict": False})
    return experiment
