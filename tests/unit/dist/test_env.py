"""Ranks from whatever launcher started the process; the variables are those that each of them really sets."""

import pytest

from tokscale.base.errors import EnvironmentRefused
from tokscale.dist.env import ProcessEnv, detect, export, launch_name, rendezvous_port

# From `srun` of Slurm 22.05 on two nodes, the second of which got one task more.
SRUN = {
    "SLURM_JOB_ID": "31234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "MASTER_ADDR": "10.0.0.1",
}
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29501",
}
# launcher/launch.py of DeepSpeed 0.19.8
DEEPSPEED = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29501",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29501",
}


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, MPIRUN], ids=["torchrun", "deepspeed", "mpirun"])
def test_three_launchers_of_two_hosts_say_the_same(environ):
    env = detect(environ)
    assert (env.rank, env.world, env.local_rank, env.local_world, env.node, env.nodes) == (9, 16, 1, 8, 1, 2)
    assert (env.master_addr, env.master_port, env.is_main) == ("host0", 29501, False)


def test_srun_with_uneven_nodes_and_a_port_of_the_jobs_own():
    env = detect(SRUN)
    assert (env.rank, env.world, env.local_rank, env.local_world, env.node, env.nodes) == (3, 5, 1, 3, 1, 2)
    assert (env.launcher, env.job, env.master_port) == ("slurm", "31234", 12000 + 31234 * 31 % 20000)
    # Every task of an array has a job id, and so a port, of its own.
    assert detect(SRUN | {"SLURM_JOB_ID": "31235"}).master_port != env.master_port
    # And so have another start of the job, and another step.
    for other in ({"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "3"}):
        assert detect(SRUN | other).master_port != env.master_port
    for job in range(0, 200_000, 97):
        assert 12000 <= rendezvous_port({"SLURM_JOB_ID": str(job)}) < 32000  # below what the kernel gives connections


def test_what_our_batch_files_say_wins_over_images_and_the_submitting_shell():
    asked = {"TOKSCALE_LAUNCHER": "srun", "TOKSCALE_MASTER_ADDR": "n7", "TOKSCALE_MASTER_PORT": "12345"}
    env = detect(SRUN | asked | {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "16", "MASTER_ADDR": "localhost"})
    assert (env.rank, env.world, env.launcher, env.master_addr, env.master_port) == (3, 5, "slurm", "n7", 12345)


def test_a_master_address_that_is_each_nodes_own_is_refused():
    with pytest.raises(EnvironmentRefused, match="MASTER_ADDR=localhost means another machine on each of the 2 nodes"):
        detect(SRUN | {"MASTER_ADDR": "localhost"})


def test_torchrun_inside_a_job_goes_by_torchrun():
    env = detect(SRUN | TORCHRUN)
    assert (env.rank, env.world, env.launcher, env.job) == (9, 16, "torchrun", "31234")


@pytest.mark.parametrize(
    "leaked",
    [
        {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "16"},  # the hook of an image
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},  # of a shell
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    ],
)
def test_tasks_of_srun_by_hand_are_not_renamed_by_what_leaks_in(leaked):
    env = detect(SRUN | leaked)
    assert (env.rank, env.world, env.local_world, env.launcher) == (3, 5, 3, "slurm")


def test_launchers_that_srun_has_started_have_the_word():
    torchrun = {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert detect(SRUN | {"SLURM_NTASKS": "2"} | torchrun).launcher == "torchrun"
    assert detect(SRUN | MPIRUN).launcher == "mpi"  # its daemons on other nodes are tasks of a step


def test_a_batch_script_and_a_single_task_are_alone():
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert detect(batch) == ProcessEnv(job="31234")
    assert detect(SRUN | {"SLURM_NTASKS": "1"}).world == 1
    assert detect({}) == ProcessEnv()


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967292"], ids=["interactive", "batch", "extern"])
def test_a_shell_of_salloc_or_a_batch_script_in_a_step_of_its_own_is_alone(step):
    # From `salloc -n2` with LaunchParameters=use_interactive_step: PROCID is 0, and NTASKS that of the allocation.
    shell = SRUN | {"SLURM_STEP_ID": step, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert detect(shell) == ProcessEnv(job="31234")
    assert detect(shell | {"SLURM_STEP_NUM_TASKS": "1"}) == ProcessEnv(job="31234")


def test_the_steps_own_number_of_tasks_counts_where_it_is_told():
    assert detect(SRUN | {"SLURM_STEP_NUM_TASKS": "4"}).world == 4
    assert detect(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == ProcessEnv(job="31234")


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        (SRUN | {"SLURM_RESTART_COUNT": "3"}, "31234.3"),
        (SRUN | TORCHRUN, "31234.0"),
        (TORCHRUN, "torchrun-host0-29501.0"),
    ],
)
def test_all_ranks_of_a_launch_call_it_the_same(environ, name):
    assert {launch_name(detect(environ | {"RANK": rank, "SLURM_PROCID": rank}), environ) for rank in "01"} == {name}


def test_what_is_incomplete_is_refused_by_name():
    with pytest.raises(EnvironmentRefused, match="SLURM_LOCALID=None is not a number"):
        detect({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"})
    with pytest.raises(EnvironmentRefused, match=r"RANK=16 does not lie in \[0, WORLD_SIZE=16\)"):
        detect(TORCHRUN | {"RANK": "16"})
    with pytest.raises(EnvironmentRefused, match="mpirun -x MASTER_ADDR"):
        detect({name: value for name, value in MPIRUN.items() if name != "MASTER_ADDR"})


def test_what_libraries_below_look_for_is_exported_whatever_the_launcher():
    target: dict[str, str] = {}
    export(detect(MPIRUN), target)
    assert detect(target) == detect(DEEPSPEED)
