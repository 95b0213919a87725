"""Scaffold: the configurations and cluster files that raykd ships, found by name and copied by `raykd init`."""

import argparse
import difflib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from raykd.config.base import NAME_PATTERN
from raykd.errors import UserError
from raykd.runtime.console import print_result

# Symbolic links to the repository's configs/ and cluster/; in a wheel, copies of the files.
ASSETS = Path(__file__).parent / "assets"
STARTER = "starter"
CLUSTERS = ("aws", "gcp", "azure", "kuberay", "local")
# The folder that every node of the shipped cluster files mounts.
SHARED_STORAGE = "/mnt/raykd"


def shipped_configs() -> dict[str, Path]:
    """Return the file of each shipped configuration by its name, such as `gsm8k/8b-to-1b`."""
    root = ASSETS / "configs"
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}


def find_config(file: str) -> str:
    """Return the path of an experiment, given as a path or as the name of a shipped configuration.

    A file of that name in the current folder takes precedence.

    Raises:
        UserError: if a name without a suffix is neither.
    """
    configs = shipped_configs()
    if file in configs:
        return file if Path(file).is_file() else str(configs[file])
    if Path(file).suffix or os.path.lexists(file):
        return file
    close = difflib.get_close_matches(file, configs, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"{file!r}: no such file or shipped configuration; {hint}shipped: {', '.join(configs)}")


def cluster_files(cluster: str) -> dict[Path, Path]:
    """Return the shipped files of a kind of cluster: the path below the current folder, and the file to copy."""
    root = ASSETS / "cluster"
    files = sorted((root / "kuberay").glob("*.yaml")) if cluster == "kuberay" else [root / f"{cluster}.yaml"]
    return {Path("cluster") / file.relative_to(root): file for file in [root / "README.md", *files]}


def write_experiment(name: str, source: str = STARTER, cluster: str | None = None) -> list[Path]:
    """Write `NAME.yaml` and the files of a cluster into the current folder. Never overwrite a file.

    Args:
        name: the experiment's name.
        source: name of the shipped configuration to copy.
        cluster: one of `CLUSTERS`, or None for no cluster files.

    Returns:
        The paths of the written files, relative to the current folder; the experiment is the first.

    Raises:
        UserError: if the name is invalid, or if a file exists or cannot be written; nothing is overwritten then.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"init: invalid name {name!r}; use letters, digits, '.', '_' and '-'")
    configs = shipped_configs()
    if source not in configs:
        raise UserError(f"init: --from {source}: no such shipped configuration; shipped: {', '.join(configs)}")
    # YAML would read some names, such as `1e3` or `on`, as other types than strings.
    experiment = re.sub(r"^name: .*$", f'name: "{name}"', configs[source].read_text("utf-8"), count=1, flags=re.M)
    texts = {Path(f"{name}.yaml"): experiment}
    if cluster:
        texts |= {path: file.read_text("utf-8") for path, file in cluster_files(cluster).items()}
    if existing := [str(path) for path in texts if path.exists() or path.is_symlink()]:
        raise UserError(f"init: {', '.join(existing)} already exists; choose another name, or another folder")
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise UserError(f"init: cannot write {path}: {error.strerror or error}") from None
    return list(texts)


def next_steps(file: Path, cluster: str | None) -> str:
    """Return the commands that follow `raykd init`, one a line."""
    experiment = shlex.quote(str(file))
    if not cluster:
        return f"next: raykd run {experiment}"
    plan = f"raykd plan {experiment} --cluster cluster/{'kuberay/nodes' if cluster == 'kuberay' else cluster}.yaml"
    if cluster == "kuberay":
        start = "kubectl apply -f cluster/kuberay/shared.yaml -f cluster/kuberay/raycluster.yaml"
    else:
        start = f"ray up cluster/{cluster}.yaml"
    return (
        f"next: fill in what is marked FILL_IN in cluster/ (cluster/README.md, sections 1 and 2), then\n"
        f"  {plan}\n"
        f"  {start}\n"
        f"  ray job submit --working-dir . -- raykd run {experiment} storage={SHARED_STORAGE}"
    )


def add_parser(commands: Any) -> None:
    """Add the command `init` to argparse's subparsers."""
    text = "write an experiment to start from, and the files of a cluster, into the current folder"
    parser = commands.add_parser("init", help=text, description=text[0].upper() + text[1:] + ". Overwrites nothing.")
    parser.add_argument("name", metavar="NAME", nargs="?", default="experiment", help="its name (experiment)")
    parser.add_argument(
        "--from", dest="source", metavar="CONFIG", default=STARTER, help=f"shipped configuration to copy ({STARTER})"
    )
    parser.add_argument("--cluster", choices=CLUSTERS, help="also write the files of such a cluster into cluster/")


def init(options: argparse.Namespace) -> int:
    """Run `raykd init`: write the files, and print their paths and the next command."""
    written = write_experiment(options.name.removesuffix(".yaml"), options.source, options.cluster)
    print_result(f"wrote: {', '.join(map(str, written))}")
    print_result(next_steps(written[0], options.cluster))
    return 0
