"""Checks before anything starts: the stages must fit the cluster, and prompts the context length."""

from collections.abc import Sequence

from raykd.cluster.capacity import fits_on_one_node
from raykd.cluster.resources import attention_workers, check_engine, check_trial, engine_bundles, resolve_accelerator
from raykd.errors import UserError
from raykd.evaluation import evaluate
from raykd.pipeline.plan import Plan
from raykd.storage import filesystem
from raykd.storage.paths import split_file
from raykd.teacher import build_prompts, completion_set

# What is done on a cluster, in this order.
STAGES = ("generate", "train", "evaluate", "attention")


def preflight(plan: Plan, resources: dict[str, float], stages: Sequence[str] = STAGES) -> None:
    """Before anything is started: what is still to be done must fit into the cluster, and prompts into the models.

    Args:
        plan: the experiment.
        resources: the cluster's, as Ray names them.
        stages: those that will run.

    Raises:
        UserError: with what does not fit, and the way out.
    """
    experiment, instruction = plan.experiment, plan.experiment.prompt.instruction
    pending = plan.pending if "train" in stages else []
    # Seeds of an arm ask the same.
    own = {job.config_id: job for job in pending if job.arm.targets.source == "student"}
    to_score = [(request, job.arm.targets.rollout) for name, job in own.items() if (request := plan.asked[name])]
    missing = completion_set.missing_sets(plan.requests) if "generate" in stages else []
    will_serve = experiment.teacher.endpoint is None and bool(missing or to_score)
    will_predict = "evaluate" in stages and not plan.is_predicted()
    for name, engine, replicas, is_needed in (
        ("teacher", experiment.teacher.engine, experiment.teacher.replicas.min, will_serve),
        ("evaluate", experiment.evaluate.engine, 1, bool(own) or will_predict),
    ):
        if is_needed:
            kind = resolve_accelerator(engine.accelerator, resources)
            check_engine(f"{name}.engine", engine, kind, resources, replicas)
    students = experiment.evaluate.engine
    group = engine_bundles(students, resolve_accelerator(students.accelerator, resources))
    if filesystem.is_remote(plan.root) and (own or will_predict) and not fits_on_one_node(group):
        raise UserError(
            f"evaluate.engine: its {len(group)} processes do not fit onto one node, and Ray brings adapters from a "
            "bucket to one only; lower its tensor or pipeline parallel size, or give a folder that all nodes see as "
            "storage"
        )
    bounds = plan.pending_search.corners if plan.pending_search and "train" in stages else []
    for train in [job.arm.train for job in pending] + [each.arm.train for each in bounds]:
        check_trial(train, resolve_accelerator(train.accelerator, resources), resources)
    if plan.experiment.attention and "attention" in stages and not plan.is_measured():
        kind = resolve_accelerator(plan.experiment.attention.accelerator, resources)
        attention_workers(plan.experiment.attention, kind, resources)
    for requests, room in [
        *([[request], request.sampling.max_tokens] for request in missing),
        *([[request], sampling.max_tokens] for request, sampling in to_score),
    ]:
        build_prompts.check_teacher_lengths(requests, plan.problems, experiment.teacher, instruction, room)
    told = experiment.evaluate
    answering = [
        (f"student of arm {job.arm_name!r}", "train", told.as_in_training(job.arm.targets.rollout))
        for job in own.values()
    ]
    if (pending or bounds) and experiment.sweep and experiment.sweep.metric == "accuracy":
        answering.append(("students", "validation", told.as_in_training(told.sampling)))
    if will_predict:
        answering.append(("students", "test", told))
    for whose, split, asked in answering:
        evaluate.check_student_lengths(
            split_file(plan.problems, split),
            student=experiment.student,
            evaluation=asked,
            instruction=instruction,
            role=whose,
        )
