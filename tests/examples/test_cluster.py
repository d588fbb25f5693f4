"""The files under examples/cluster start the command that there is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpo.app.arguments import settings_given
from kvpo.app.cli import _parsers, _preset_for_help
from kvpo.app.presets import PRESETS

CLUSTER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
ECHO = '#!/bin/sh\nprintf "%s\\n" "$@"\n'
SLURM = {"scontrol": "#!/bin/sh\necho node-a\necho node-b\n", "srun": '#!/bin/sh\nshift\nexec "$@"\n'}


def kvpo_arguments(words: list[str]) -> Any:
    """Arguments that kvpo parses from the words behind ``-m kvpo``."""
    at = words.index("-m") + 1
    assert words[at] == "kvpo"
    parsed = _parsers(_preset_for_help(words))[0].parse_args(words[at + 1 :])
    assert parsed.command == "align" and parsed.preset in PRESETS and parsed.resume
    return parsed


def every_rank_has_a_group(words: list[str], ranks: int) -> bool:
    """True if teams of equal size, none of them across nodes, have a group each."""
    given = kvpo_arguments(words)
    size = int(settings_given(given)["distributed.branch_ranks"])
    return 8 % size == 0 and ranks // size <= PRESETS[given.preset]().optim.prompts_per_update


def demand_torchrun(words: list[str]) -> dict[str, str]:
    """The options of torchrun, as torchrun itself reads them."""
    from torch.distributed.run import get_args_parser

    return vars(get_args_parser().parse_args(words))


@pytest.fixture
def started(tmp_path: Path) -> Any:
    """The words that a script starts torchrun with, where torchrun and Slurm only say what they are given."""
    for name, text in {"torchrun": ECHO, **SLURM}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def words(script: str, *arguments: str, **variables: str) -> list[str]:
        path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin"
        command = [shutil.which("sh") or "sh", str(CLUSTER / script), *arguments]
        environment = {"PATH": path, **variables}
        root = CLUSTER.parents[1]
        return subprocess.run(
            command, cwd=root, env=environment, check=True, capture_output=True, text=True
        ).stdout.split("\n")[:-1]

    return words


def test_torchrun_on_every_node(started: Any) -> None:
    words = started("torchrun.sh", "--optim.updates", "4", NODES="3", HEAD="node-a", OUT="/runs/a b")
    options = demand_torchrun(words)
    assert (options["nnodes"], options["rdzv_endpoint"]) == ("3", "node-a:29500")
    assert options["max_restarts"] == 3 and options["nproc_per_node"] == "8"
    assert kvpo_arguments(words).out == Path("/runs/a b")
    demand_torchrun(started("torchrun.sh"))
    assert every_rank_has_a_group(started("torchrun.sh", NODES="2"), 16)
    words = started("torchrun.sh", BRANCH_RANKS="2")
    assert settings_given(kvpo_arguments(words))["distributed.branch_ranks"] == "2"


def test_slurm_starts_one_torchrun_per_node(started: Any) -> None:
    given = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    options = demand_torchrun(started("slurm.sbatch", **given))
    assert (options["nnodes"], options["rdzv_endpoint"], options["rdzv_id"]) == (
        "2",
        "node-a:29500",
        "kvpo-7",
    )
    text = (CLUSTER / "slurm.sbatch").read_text()
    assert "--nodes=2" in text and "--ntasks-per-node=1" in text and "--gpus-per-node=8" in text


def test_an_update_has_the_time_that_the_files_promise() -> None:
    """torchrun kills its ranks before the scheduler kills torchrun; half of its patience is the update's."""
    scripts = {path.name: path.read_text() for path in CLUSTER.iterdir()}
    (shell,) = re.findall(r"{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)}", scripts["torchrun.sh"])
    (pod,) = re.findall(r'name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, value: "(\d+)"', scripts["pytorchjob.yaml"])
    (slurm,) = re.findall(r"--signal=TERM@(\d+)", scripts["slurm.sbatch"])
    (grace,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", scripts["pytorchjob.yaml"])
    assert int(shell) < int(slurm) and int(pod) < int(grace)
    assert f"within {int(shell) // 2} s" in scripts["slurm.sbatch"]


def test_the_pytorchjob_is_whole() -> None:
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert words[0] == "torchrun" and container["name"] == "pytorch"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["nprocPerNode"] == str(gpus)
    assert every_rank_has_a_group(words, gpus * worker["replicas"])
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert {volume["name"] for volume in worker["template"]["spec"]["volumes"]} == set(mounts)
    assert str(kvpo_arguments(words).out).startswith(mounts["runs"])
