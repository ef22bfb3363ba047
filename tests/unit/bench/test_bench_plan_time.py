"""The time model of `bench plan`, against what can be worked out by hand."""

from dataclasses import replace

import pytest

from tokscale.bench.plan_time import (
    Choice,
    TimeConfig,
    Work,
    best,
    choices,
    days,
    draw,
    smallest_tokens,
    step_time,
    stops_hiding,
    table,
)

WORK = Work(parameters=10**9, flops=6e9 * 1000, kept=0.0, tokens=1000, layers=0, update_bytes=32.0)
PLAIN = TimeConfig(peak_flops=1e15, efficiency=0.5, memory_bandwidth=4e12, node_bandwidth=4e11, link_bandwidth=5e10)


def timed(choice: Choice, config: TimeConfig = PLAIN, work: Work = WORK):
    return step_time(work, choice, config, dtype="bf16", gpus_per_node=8)


def test_one_gpu_computes_and_updates():
    time = timed(Choice(1, 4))
    assert time.compute == pytest.approx(4 * 6e12 / 5e14) and time.exposed == 0
    assert time.optimizer == pytest.approx(1e9 * 32 / 4e12) and time.mfu < 0.5
    assert timed(Choice(1, 4, remat="block")).compute == pytest.approx(4 / 3 * time.compute)
    assert timed(Choice(1, 4, micro_batches=3)).compute == pytest.approx(3 * time.compute)


def test_what_travels_is_what_was_counted_on_ranks():
    slow = PLAIN.model_copy(update={"efficiency": 1.0, "peak_flops": 1e30})  # nothing hides
    for m in (1, 2, 4):
        plain, hpz = (timed(Choice(16, 1, m, hpz=hpz), slow) for hpz in (False, True))
        far, near = 15 / 16 * 2e9, 7 / 8 * 2e9
        assert plain.exposed_gather == pytest.approx(2 * m * far / 5e10)
        assert hpz.exposed_gather == pytest.approx(far / 5e10 + (2 * m - 1) * near / 4e11)
        assert plain.exposed_reduce == hpz.exposed_reduce == pytest.approx(m * far / 5e10)


def test_the_rule_is_where_the_model_stops_waiting():
    config = PLAIN.model_copy(update={"overlap_comm": False})
    least = smallest_tokens(config, "bf16", 16)
    assert least == pytest.approx((2 * 2 + 2) / 6 * 5e14 / 5e10) == pytest.approx(10_000)
    assert smallest_tokens(config, "bf16", 64) == pytest.approx(least * 8 / 6)  # gradients in fp32
    assert smallest_tokens(config, "bf16", 16, link=4e11) == pytest.approx(least / 8)
    # Of computing, two thirds are as long as the two gatherings then.
    size = int(least / WORK.tokens)
    assert timed(Choice(16, size)).exposed_gather == 0 and timed(Choice(16, size // 2)).exposed_gather > 0


def test_reductions_hide_only_where_they_may():
    shown, hidden = (timed(Choice(16, 40), PLAIN.model_copy(update={"overlap_comm": on})) for on in (False, True))
    assert shown.exposed_reduce > 0 and hidden.exposed_reduce == 0
    assert hidden.hidden == pytest.approx(shown.hidden + shown.exposed_reduce)


def small_enough(choice: Choice) -> bool:
    return choice.micro_batch_size <= 16


def test_more_gpus_train_more_but_not_for_ever_and_the_best_is_found():
    config = PLAIN.model_copy(update={"batch_size": 2048, "tokens": 1e12})
    found = {}
    for gpus in (8, 64, 512, 2048):
        tried = list(choices(gpus, config, ["none", "block"], 8, 64))
        found[gpus] = best(WORK, tried, config, small_enough, dtype="bf16", gpus_per_node=8)
    rates = [pair[1].tokens_per_second for pair in found.values()]
    assert rates == sorted(rates) and rates[3] / 2048 < 0.7 * rates[0] / 8
    assert found[8][0].micro_batch_size == 16 and found[8][0].remat == "none" and not found[8][0].hpz
    assert found[512][0].hpz, "across nodes a second copy pays"
    assert stops_hiding(found) in (64, 512, 2048)
    assert days(found[8][1], 1e12) == pytest.approx(1e12 / rates[0] / 86400)
    lines = table(found, config)
    assert "days" in lines[0] and "hpZ" in lines[2]


def test_a_batch_that_does_not_divide_or_fit_is_said():
    config = PLAIN.model_copy(update={"batch_size": 100})
    assert not list(choices(8, config, ["none"], 8, 64))
    tried = list(choices(4, config, ["none"], 8, 64))
    assert [choice.micro_batch_size for choice in tried][::2] == [1] and tried[0].micro_batches == 25
    assert best(WORK, tried, config, lambda choice: False, dtype="bf16", gpus_per_node=8) is None
    assert "nothing fits" in table({4: None}, config)[0]


def test_the_picture_is_drawn(tmp_path):
    found = {gpus: (Choice(gpus, 4), timed(Choice(gpus, 4))) for gpus in (8, 64, 512)}
    draw(found, "a model", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_work_that_is_not_products_is_bound_by_memory():
    kept = replace(WORK, kept=1e9)
    assert timed(Choice(1, 2), work=kept).compute - timed(Choice(1, 2)).compute == pytest.approx(2 * 1e9 * 5 / 4e12)
