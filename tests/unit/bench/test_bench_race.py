"""`bench race`: turns, clocks and looks; our side trains, and what is drawn of it all. The originals' side is long."""

import itertools
import json

import pytest
import tiny_pipeline
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError, EnvironmentRefused
from tokscale.bench import race, racing
from tokscale.bench.comparison import originals_python
from tokscale.bench.race import RaceBench, time_to
from tokscale.bench.race_models import FAMILIES, train
from tokscale.bench.racing import STATES, Slices, batches, caption_states, plain_loop, rate
from tokscale.dist.env import ProcessEnv
from tokscale.evaluation.measures import load_eval_pairs
from tokscale.stages import prepare
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.dvae.original import state_dict_from_original, state_dict_to_original
from tokscale.tokenizers.image import save_image_tokenizer
from tokscale.tokenizers.text import train_bpe
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.model import VQGAN


def point(side: str, seconds: float, loss: float) -> dict:
    return {
        "side": side,
        "seconds": seconds,
        "cpu_seconds": seconds,
        "steps": int(seconds),
        "train_loss": loss,
        "held_out_loss": {"total": loss},
        "prompt_accuracy": {"all": 0.5},
    }


def test_every_epoch_is_a_permutation_of_its_own_and_the_same_for_both_sides():
    first, second = (list(itertools.islice(batches(10, 3, seed=1), 9)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    epochs = [torch.cat(first[at : at + 3]) for at in (0, 3, 6)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs) and not torch.equal(epochs[0], epochs[1])


def test_the_rate_rises_and_then_stays():
    assert [rate(step, 1.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] and rate(0, 2.0, 0) == 2.0


def test_captions_are_told_by_word_and_place_and_padding_not_at_all():
    ids = torch.tensor([[3, 5, 0], [5, 3, 0]])
    states = caption_states(ids, 8)
    assert states.shape == (2, 3, STATES) and not states[:, 2].any()
    assert not torch.equal(states[0, 0], states[1, 1]) and torch.equal(states, caption_states(ids, 8))


def test_the_plain_loop_is_adam_with_a_clipped_gradient():
    mine, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    targets = torch.tensor([[3.0, 1.0], [0.5, 4.0]])
    loop = {"lr": 0.1, "warmup_steps": 2, "betas": (0.9, 0.98), "clip": 1.0}
    update = plain_loop([mine], lambda rows: (mine - targets[rows]).square().mean(), **loop)
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.98))
    for step in range(4):
        rows = torch.tensor([step % 2])
        optimizer.param_groups[0]["lr"] = 0.05 if step == 0 else 0.1
        expected = (theirs - targets[rows]).square().mean()
        optimizer.zero_grad()
        expected.backward()
        theirs.grad *= min(1.0, 1.0 / theirs.grad.norm())
        optimizer.step()
        assert update(step, rows) == pytest.approx(expected.item())
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_slice_counts_training_and_what_comes_once_before_it_but_not_the_writing(monkeypatch):
    now, said = [0.0], []

    def pass_(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(racing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(racing.time, "process_time", lambda: now[0] / 2)

    def update(step: int, rows: torch.Tensor) -> torch.Tensor:
        pass_(2.0)
        return torch.tensor(float(step))

    def write() -> None:
        pass_(100.0)
        said.append("written")

    def prepare() -> None:
        pass_(4.0)
        said.append("begun")

    made = Slices(5.0, batches(4, 2), update, write, prepare)
    assert made() == {"seconds": 6.0, "cpu_seconds": 3.0, "steps": 1, "loss": 0.0}
    assert made() == {"seconds": 6.0, "cpu_seconds": 3.0, "steps": 4, "loss": 2.0}
    assert said == ["begun", "written", "written"]


def test_sides_take_turns_until_both_have_had_their_time_and_all_looks():
    turns = []

    def side(name: str, seconds: float):
        steps = itertools.count(1)

        def call():
            turns.append(name)
            return {"seconds": seconds, "cpu_seconds": seconds / 2, "steps": next(steps), "loss": 1.0}

        return call

    config = decode(RaceBench, {"minutes": 1.0, "looks": 3})
    found = list(race._run(config, {"ours": side("ours", 10.0), "original": side("original", 25.0)}, lambda name: {}))
    assert turns[:6] == ["ours", "original"] * 3 and turns[6:] == ["ours"] * 3
    assert [(p["seconds"], p["steps"]) for p in found if p["side"] == "ours"] == [(20.0, 2), (40.0, 4), (60.0, 6)]
    assert [p["seconds"] for p in found if p["side"] == "original"] == [25.0, 50.0, 75.0]


def test_time_to_a_loss_lies_on_the_line_between_two_looks():
    points = [point("ours", 60, 2.0), point("original", 60, 9.0), point("ours", 120, 1.0), point("ours", 180, 0.5)]
    assert time_to(points, "ours", 1.5) == 90 and time_to(points, "ours", 2.5) == 60
    assert time_to(points, "ours", 0.75) == 150 and time_to(points, "ours", 0.1) is None


def test_rows_say_who_did_more_and_who_came_lower(tmp_path):
    points = [point("ours", 60, 1.0), point("original", 60, 2.0), point("ours", 120, 0.5), point("original", 120, 1.0)]
    points[2]["steps"] = 240
    found = {row["name"]: row for row in race._rows(decode(RaceBench, {"minutes": 2}), points)}
    case = "race/dalle/2-minutes/fp32/vs-original"
    assert found[f"{case}/steps"]["ratio"] == 2.0 and found[f"{case}/held-out-loss"]["ratio"] == 2.0
    assert found[f"{case}/time-to-its-held-out-loss"]["ratio"] == 2.0
    assert found["race/dalle/2-minutes/fp32/ours/prompt-accuracy/all"]["ours"] == 0.5
    race.draw(points, tmp_path / "race.png", "title")
    assert (tmp_path / "race.png").stat().st_size > 5000


def test_the_tokenizers_weights_go_to_the_original_and_back():
    config = DiscreteVAEConfig(image_size=16, num_layers=2, num_resnet_blocks=1, hidden_dim=4, codebook_dim=4)
    state = DiscreteVAE(config).state_dict()
    there = state_dict_to_original(state, config)
    assert "encoder.3.weight" in there and not any(name.startswith("to_logits") for name in there)
    back = state_dict_from_original(there, config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A quickstart's folders with an image tokenizer that nobody trained."""
    folder = tmp_path_factory.mktemp("quickstart")
    tiny_pipeline.make_image_tokenizer(folder / "image_tokenizer")
    shared = {"run_dir": folder, "data_dir": folder / "data"}
    prepare.run(decode(prepare.CONFIG, shared | {"source": {"kind": "shapes", "count": 64}}), ProcessEnv())
    captions, _ = load_eval_pairs(folder / "data/raw", 8)
    train_bpe(captions, 300, folder / "text_tokenizer")
    return folder


def asked(folder, **values) -> RaceBench:
    sizes = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "text_seq_len": 24, "held_out": 4, "prompts": 4}
    shared = {"run_dir": folder, "data_dir": folder / "data", "batch_size": 8, "lr": 3e-3, "warmup_steps": 2}
    return decode(RaceBench, shared | sizes | {"minutes": 0.02, "slice_seconds": 0.4, "looks": 2} | values)


@pytest.mark.parametrize(("family", "dtype"), [*((family, "fp32") for family in FAMILIES), ("dalle", "bf16")])
def test_our_side_trains_on_the_raw_images_and_is_judged_by_its_weights(family, dtype, quickstart, tmp_path):
    config = asked(quickstart, family=family)
    image, text = race._tokenizers(config)
    torch.save(race._inputs(config, image, text), tmp_path / "inputs.pt")
    model = FAMILIES[family].ours(race._sizes(config), image, text)
    side = train(
        inputs=str(tmp_path / "inputs.pt"),
        weights=str(tmp_path / "ours.pt"),
        seconds=0.0,
        batch_size=8,
        model=model.model_dump(mode="json"),
        words=text.num_tokens,
        tokenizer=str(quickstart / "image_tokenizer") if FAMILIES[family].from_pixels else None,
        dtype=dtype,
        loop={"lr": 3e-3, "warmup_steps": 2, "betas": (0.9, 0.98), "clip": 1.0},
    )
    judge = race._Judge(config, model, image, text)
    looks = []
    for _ in range(2):
        steps = [side() for _ in range(15)]
        looks.append(judge("ours", torch.load(tmp_path / "ours.pt", weights_only=True)))
    assert steps[-1]["steps"] == 30 and steps[-1]["seconds"] > 0
    assert looks[1]["held_out_loss"]["total"] < looks[0]["held_out_loss"]["total"]
    groups = {"all", "one, seen", "one, held out", "two, seen", "two, held out"}
    assert looks[1]["prompt_accuracy"].keys() == groups


def test_what_cannot_race_is_refused(quickstart, tmp_path):
    with pytest.raises(DataError, match="no images to race on"):
        race._tokenizers(asked(quickstart, data_dir=tmp_path))
    with pytest.raises(ConfigError, match="is a vqgan"):
        small = {"network": {"kind": "resnet", "dim": 8, "layers": 1, "num_resnet_blocks": 0}, "image_size": 8}
        save_image_tokenizer(VQGAN(decode(VQGANConfig, small | {"quantizer": {"dim": 8}})), tmp_path / "vqgan")
        race._tokenizers(asked(quickstart, image_tokenizer=tmp_path / "vqgan"))


def _originals() -> bool:
    try:
        originals_python()
    except EnvironmentRefused:
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.skipif(not _originals(), reason="the originals are not there: ./launch/originals")
def test_both_sides_race_and_every_look_is_kept(family, quickstart, tmp_path):
    keys = {"curves": tmp_path / "curves.json", "figure": tmp_path / "race.png", "minutes": 0.1, "family": family}
    found = {row["name"]: row for row in race.rows(asked(quickstart, **keys))}
    points = json.loads(keys["curves"].read_text())
    assert [sum(point["side"] == side for point in points) for side in ("ours", "original")] == [2, 2]
    assert keys["figure"].exists() and found[f"race/{family}/0.1-minutes/fp32/vs-original/steps"]["ours"] > 0
