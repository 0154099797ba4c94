"""TorchX components: `torchx run launch/components.py:train …`; docs/cluster.md shows each of them on each scheduler.

Written on torchx.specs alone. TorchX runs this file inside a module of its own and reads the annotations as text, so
there is no `from __future__ import annotations` here, and nothing whose name TorchX might use. What is above the line
of an `Args:` is the component's help.
"""

import re
import shlex
from typing import Dict, List, Optional  # noqa: UP035

from torchx import specs
from torchx.specs.finder import ComponentValidationException

_MLET = ("python", "-m", "mlet_dist")
_BEGIN_ANEW = re.compile(r"run\.overwrite=(true|yes|on|1)|train\.resume=never", re.IGNORECASE)


def train(
    *settings: str,
    config: str,
    data: str,
    run: str,
    export: Optional[str] = None,  # noqa: UP045
    checkpoints: Optional[str] = None,  # noqa: UP045
    j: str = "1x1",
    h: str = "cpu",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 3,
    port: int = 0,
    wait: int = 600,
    name: str = "mlet-train",
) -> specs.AppDef:
    """Train on several nodes, and then export and verify on the first of them.

    The same command goes on where an earlier one was stopped. A run that has finished is left as it is.

    Args:
        settings: of `mlet train`, such as train.epochs=2, after a --
        config: YAML file, as the nodes see it
        data: data.path: the same storage on all nodes, or a URL
        run: run.dir: the same storage on all nodes
        export: where the plain TorchRec tables go; without it nothing is exported
        checkpoints: train.checkpoint_dir, if not in the run: the same storage on all nodes, or a URL
        j: nodes x ranks of each, as 2x8; 1:4x8 for one to four nodes that may leave and come
        h: named resource of a node, see launch/resources.py
        image: container image that has mlet_dist; schedulers without containers do not look at it
        mounts: as of dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: variables of the nodes, e.g. NCCL_DEBUG=INFO
        max_retries: how often the scheduler starts all nodes again
        port: on which the first node listens; 0 for one that follows from the command
        wait: seconds that all nodes may take to come
        name: of the job
    """
    nodes, ranks, fewest = _parse_j(j)
    if any(_BEGIN_ANEW.fullmatch(setting) for setting in settings) and max_retries > 0:
        raise ComponentValidationException(
            f"{' '.join(filter(_BEGIN_ANEW.fullmatch, settings))}: a scheduler that starts the nodes again would begin "
            "the run anew each time; choose another --run, or --max_retries 0"
        )
    given = [f"data.path={data}", f"run.dir={run}", *settings]
    if checkpoints is not None:
        given.insert(2, f"train.checkpoint_dir={checkpoints}")
    count = f"{fewest}:{nodes}" if fewest < nodes else f"{nodes}"
    where = ["--nproc", f"{ranks}", "--nnodes", count, "--wait", f"{wait}"]
    if port:
        where += ["--master-port", f"{port}"]
    if export is not None:
        where += ["--export", export]
    script = f"exec {_shell('train', config, *given, '--json', '--once', *where)} {_THIS_NODE}"
    role = _role("train", script, image, h, mounts, env, max_retries)
    role.num_replicas, role.min_replicas = nodes, fewest if fewest < nodes else None
    if port:
        role.port_map = {"c10d": port}
    return specs.AppDef(name=name, roles=[role])


def export(
    run: str,
    out: str,
    data: str,
    h: str = "cpu",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 1,
    name: str = "mlet-export",
) -> specs.AppDef:
    """Collapse a finished run into plain TorchRec tables and compare their predictions with the run's, row by row.

    Args:
        run: what `train` made
        out: where the tables go
        data: the run's data
        h: named resource, see launch/resources.py
        image: container image that has mlet_dist
        mounts: as of dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: variables
        max_retries: how often the scheduler starts it again
        name: of the job
    """
    role = _role("export", _export_once(run, out, data), image, h, mounts, env, max_retries)
    return specs.AppDef(name=name, roles=[role])


def sweep(
    *settings: str,
    config: str,
    data: str,
    run: str,
    vary: List[str],  # noqa: UP006
    ranks: int = 1,
    h: str = "cpu",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 3,
    name: str = "mlet-sweep",
) -> specs.AppDef:
    """Train one run a value, each on a node of its own, into RUN/setting=value.

    All values of all settings of --vary are combined: `--vary "model.hidden_dim=32|64,train.seed=0|1"` are four runs.

    Args:
        settings: of `mlet train`, the same for all, after a --
        config: YAML file, as the nodes see it
        data: data.path
        run: directory of the runs
        vary: settings with their values, setting=value|value
        ranks: of each run
        h: named resource of a run, see launch/resources.py
        image: container image that has mlet_dist
        mounts: as of dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: variables
        max_retries: how often the scheduler starts a run again
        name: of the job
    """
    combinations: List[List[str]] = [[]]  # noqa: UP006
    for each in vary:
        setting, _, values = each.partition("=")
        if not setting or not values:
            raise ComponentValidationException(f"--vary {each}: must be setting=value|value, as model.hidden_dim=32|64")
        combinations = [[*before, f"{setting}={value}"] for before in combinations for value in values.split("|")]
    roles = []
    for number, varied in enumerate(combinations):
        given = [f"data.path={data}", f"run.dir={run.rstrip('/')}/{','.join(varied)}", *settings, *varied]
        script = "exec " + _shell("train", config, *given, "--json", "--once", "--nproc", f"{ranks}")
        roles.append(_role(f"run-{number}", script, image, h, mounts, env, max_retries))
    return specs.AppDef(name=name, roles=roles)


def prepare(
    *raw: str,
    format: str,
    out: str,
    options: str = "",
    h: str = "cpu_large",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 3,
    name: str = "mlet-prepare",
) -> specs.AppDef:
    """Make a data set from raw files; what an interrupted one has finished is kept.

    Args:
        raw: files in time order: paths or URLs, after a --
        format: criteo, avazu or table
        out: where the data set goes
        options: more of `mlet prepare`, as one word: "--split paper --memory 64G"
        h: named resource, see launch/resources.py
        image: container image that has mlet_dist
        mounts: as of dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: variables
        max_retries: how often the scheduler starts it again
        name: of the job
    """
    script = _shell("prepare", format, *raw, "--out", out, "--json", *shlex.split(options))
    role = _role(
        "prepare", _unless_there(f"{out.rstrip('/')}/manifest.json", script), image, h, mounts, env, max_retries
    )
    return specs.AppDef(name=name, roles=[role])


# Which one this node is, and where the first one is; some schedulers do not tell the first one of itself.
_THIS_NODE = f'--node-rank {specs.macros.replica_id} --master-addr "$${{{specs.macros.rank0_env}:-localhost}}"'


def _export_once(run: str, out: str, data: str) -> str:
    made = _unless_there(f"{out.rstrip('/')}/manifest.json", _shell("export", run, "--out", out))
    return f"{made} && {_shell('verify', out, '--run', run, '--data', data, '--json')}"


def _unless_there(file: str, script: str) -> str:
    """A retry finds what was finished before it; it was renamed to its name when it was whole."""
    return f"{{ test -e {_literal(file)} || {script}; }}"


def _shell(*arguments: str) -> str:
    return " ".join([*_MLET, *map(_literal, arguments)])


def _literal(text: str) -> str:
    """A word for bash, of which TorchX takes nothing for a macro."""
    return shlex.quote(text).replace("$", "$$")


def _parse_j(j: str) -> tuple[int, int, int]:
    """Nodes, ranks of each, and the fewest nodes."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)x(\d+)", j)
    nodes, ranks = (int(match[2]), int(match[3])) if match else (0, 0)
    fewest = int(match[1] or nodes) if match else 0
    if not match or not 1 <= fewest <= nodes or not ranks:
        raise ComponentValidationException(
            f"-j {j}: must be nodes x ranks of each, as in 2x8, or the fewest and the most nodes, as in 1:4x8"
        )
    return nodes, ranks, fewest


def _role(
    name: str,
    script: str,
    image: str,
    h: str,
    mounts: Optional[List[str]],  # noqa: UP006, UP045
    env: Optional[Dict[str, str]],  # noqa: UP006, UP045
    max_retries: int,
) -> specs.Role:
    try:
        resource = specs.resource(h=h)
    except KeyError:
        raise ComponentValidationException(
            f"-h {h}: no resource of that name is registered; those of launch/resources.py come with "
            "`pip install 'mlet-dist[launch]'`"
        ) from None
    return specs.Role(
        name=name,
        image=image,
        entrypoint="bash",
        args=["-c", script],
        env=dict(env or {}),
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
        max_retries=max_retries,
    )
