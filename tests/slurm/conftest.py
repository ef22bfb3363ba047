"""One cluster for all tests, and the inputs that its jobs train on."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_cluster import LocalCluster, missing
from slurm_jobs import SlurmPipeline, log_of, losses


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")
            item.add_marker(pytest.mark.timeout(1800))  # requeues wait, and a busy machine is slow


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    why = missing()
    if why is not None:
        if os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/etc/debian_version").exists():
            pytest.fail(why)
        pytest.skip(why)
    # Not below pytest's own folders, whose names are too long for munge's socket.
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    folder.chmod(0o755)
    with LocalCluster(folder) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_left_to_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails half-way leaves no job that the next one would wait for."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").cancel_all()


@pytest.fixture(scope="session")
def pipeline(cluster, tmp_path_factory) -> SlurmPipeline:
    return SlurmPipeline(tmp_path_factory.mktemp("pipeline"), cluster)


@pytest.fixture(scope="session")
def undisturbed(pipeline, tmp_path_factory) -> list[float]:
    """Losses of the run on two nodes that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = pipeline.cluster.ended(pipeline.submit(run_dir))
    assert ended["JobState"] == "COMPLETED", log_of(run_dir)
    assert len(losses(run_dir)) == pipeline.steps
    return losses(run_dir)
