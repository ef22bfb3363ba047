"""Every shipped cluster file, given to a real sbatch for every stage; and what a scheduler refuses, named before."""

from pathlib import Path

import pytest
import yaml

from tokscale import cli
from tokscale.base.config import decode
from tokscale.stages.cluster import ClusterConfig
from tokscale.stages.submit import SubmitConfig, batch_files, calls

FILES = sorted((Path(__file__).parents[2] / "configs/cluster").glob("*.yaml"))
# The interfaces, modules and images that the files name are the sites'; sbatch does not look at them.
SITES = {
    "typed": {"partition": "a100", "gpu_flag": "--gres=gpu:a100:{count}"},
    "untyped": {"partition": "gpu", "gpu_flag": "--gres=gpu:{count}"},
    "by task": {"partition": "gpu", "gpu_flag": "--gpus-per-task=1"},
    "typed by node": {"partition": "a100", "gpu_flag": "--gpus-per-node=a100:{count}"},
    "memory of a node": {"partition": "a100", "memory": "900G", "cpu": {"partition": "cpu"}},
    "of its own by stage": {
        "partition": "gpu",
        "cpu": {"partition": "cpu", "memory": "200G", "cpus_per_task": 32},
        "stages": {"train": {"nodes": 4, "time": "1-00"}, "tokenize": {"at_once": 2, "memory": "100G"}},
        "mail_type": "END",
        "mail_user": "someone@example.org",
    },
}


def refusals(cluster, config: ClusterConfig) -> list[str]:
    made = calls(SubmitConfig(cluster=config, stages=tuple(batch_files()), code="live"), Path("/tmp/nowhere"))
    assert {call.name for call in made} >= {"train", "tokenize", "tokenize-close", "export"}
    refused = []
    for call in made:
        try:
            cluster.call("sbatch", "--test-only", *call.flags, str(call.file))
        except RuntimeError as error:
            refused.append(str(error))
    return refused


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_cluster_file_submits_every_stage(cluster, path):
    assert refusals(cluster, decode(ClusterConfig, yaml.safe_load(path.read_text()))) == []


@pytest.mark.parametrize("site", SITES, ids=str)
def test_habits_of_sites_submit_every_stage(cluster, site):
    assert refusals(cluster, decode(ClusterConfig, SITES[site])) == []


def test_the_test_cluster_refuses_what_real_ones_do(cluster):
    """The tests above can fail: too much memory, too many GPUs, another type."""
    for wrong in (
        {"partition": "gpu", "cpu": {"partition": "cpu", "memory": "900G"}},
        {"partition": "gpu", "gpus_per_node": 9},
        {"partition": "gpu", "gpu_flag": "--gres=gpu:a100:{count}"},
    ):
        assert refusals(cluster, decode(ClusterConfig, wrong))


def test_a_site_is_checked_from_outside_and_inside(cluster, tmp_path, monkeypatch, capsys):
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    words = ["submit", "recipe=debug/dalle", "cluster=local", "cluster.interface=lo", f"run_dir={tmp_path}/run"]
    assert cli.main([*words, "action=check"]) == 0
    assert "all well" in (told := capsys.readouterr().out) and "train: sbatch takes it" in told
    assert "n1 has 0 GPU(s), lo" in told
    assert cli.main([*words, "action=check", "cluster.interface=ib7"]) == 69
    assert "cluster.interface=ib7 is none of lo" in capsys.readouterr().err
    assert cli.main([*words, "action=check", "cluster.partition=nowhere"]) == 69
    assert "invalid partition" in capsys.readouterr().err
    assert cli.main([*words, "action=check", "stages=[train]", "cluster.python=/nowhere/python"]) == 69
    assert "look above for the image, the interpreter or the module" in capsys.readouterr().err
