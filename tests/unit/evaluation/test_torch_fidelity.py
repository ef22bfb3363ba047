"""The arithmetic of distances against torch-fidelity, on stored features.

No extra asks for the package: it needs torchvision, whose wheels come for one torch alone, and replace it.
"""

import importlib
from typing import Any

import pytest
import torch
from test_distances import A, B, features

from tokscale.evaluation.distances import inception_score, kernel_distance, neighbours
from tokscale.evaluation.quality import frechet_distance


@pytest.fixture(scope="module")
def fidelity() -> Any:
    try:
        return {name: importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "isc", "prc")}
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that was built for another torch
        pytest.skip(f"torch-fidelity cannot be imported: {error}")


def test_the_frechet_distance(fidelity):
    statistics = [fidelity["fid"].fid_features_to_statistics(x) for x in (A, B)]
    found = fidelity["fid"].fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet_distance(A, B) == pytest.approx(found["frechet_inception_distance"], rel=1e-6)


def test_the_kernel_distance_of_all_samples_at_once(fidelity):
    same = A, B[: len(A)]
    options = {"kid_subsets": 1, "kid_subset_size": len(A), "verbose": False}
    found = fidelity["kid"].kid_features_to_metric(*same, **options)
    assert kernel_distance(*same).value == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-6)


def test_the_inception_score_of_all_samples_at_once(fidelity):
    logits = features("logits", 60, 7)
    found = fidelity["isc"].isc_features_to_metric(logits, splits=1)
    assert inception_score(logits) == pytest.approx(found["inception_score_mean"], rel=1e-6)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall(fidelity, k):
    found = fidelity["prc"].prc_features_to_metric(B, A, prc_neighborhood=k, prc_batch_size=50, verbose=False)
    own = neighbours(torch.as_tensor(A), torch.as_tensor(B), k)
    assert {name: own[name] for name in ("precision", "recall")} == pytest.approx(
        {name: found[name] for name in ("precision", "recall")}, abs=1e-6
    )
