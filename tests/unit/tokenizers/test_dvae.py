import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokscale.base.batch import ImageBatch
from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.protocols import Collectives, LossModel, using
from tokscale.base.rng import generator, scope
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.laplace import logit_laplace_nll, squeeze, unsqueeze
from tokscale.tokenizers.dvae.layers import Codebook
from tokscale.tokenizers.dvae.model import DiscreteVAE, kl_from_uniform
from tokscale.tokenizers.dvae.original import config_from_original, state_dict_from_original
from tokscale.tokenizers.dvae.relaxation import relaxed_sample
from tokscale.tokenizers.quantize.base import codebook_usage

REFERENCE = np.load(Path(__file__).parents[2] / "assets/reference/dvae_cases.npz")
CASES = sorted({name.split("/")[0] for name in REFERENCE.files})
TINY = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 8}


def make(**options) -> DiscreteVAE:
    with scope(0, "weights"):
        return DiscreteVAE(DiscreteVAEConfig(**(TINY | options)))


def images(batch=3, channels=3, size=16) -> ImageBatch:
    pixels = torch.randint(0, 256, (batch, channels, size, size), generator=generator(0, "pictures"), dtype=torch.uint8)
    return ImageBatch(positions=torch.arange(batch), pixels=pixels)


def original(case: str) -> tuple[DiscreteVAE, dict[str, torch.Tensor]]:
    found = {name.split("/", 1)[1]: REFERENCE[name] for name in REFERENCE.files if name.startswith(case + "/")}
    config = config_from_original(json.loads(str(found.pop("hparams"))))
    tensors = {name: torch.from_numpy(value) for name, value in found.items()}
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    if isinstance(config.kl_div_loss_weight, float):  # D20: the original divides by 1, we by the batch
        weight = config.kl_div_loss_weight * len(tensors["pixels"])
        config = config.model_copy(update={"kl_div_loss_weight": weight})
    model = DiscreteVAE(config)
    model.load_state_dict(state_dict_from_original(state, config))
    return model, tensors


@pytest.mark.parametrize("case", CASES)
def test_logits_codes_and_images_equal_the_original(case):
    model, expected = original(case)
    logits = model.logits(expected["pixels"].float() / 255)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-5)
    codes = model.encode(expected["pixels"])
    assert torch.equal(codes.flatten(1), expected["codes"])
    means, stds = (torch.tensor(v)[:, None, None] for v in model.config.means_and_stds())
    torch.testing.assert_close(
        model.decode_to_unit_range(codes), expected["decoded"] * stds + means, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_original(case):
    model, expected = original(case)
    batch = ImageBatch(positions=torch.arange(len(expected["pixels"])), pixels=expected["pixels"])
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(5)
        total = model(batch).total
    total.backward()
    torch.testing.assert_close(total, expected["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encoder[0][0].weight.grad, expected["gradient"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 1},
        {"channels": 4},
        {"normalization": None},
        {"smooth_l1_loss": True},
        {"straight_through": True},
        {"straight_through": True, "reinmax": True},
        {"num_resnet_blocks": 2, "num_layers": 1},
        {"logit_laplace_loss": True, "normalization": None, "kl_div_loss_weight": 1e-3},
    ],
)
def test_every_option_trains_and_round_trips(options):
    model = make(**options)
    assert isinstance(model, LossModel)
    assert decode(DiscreteVAEConfig, encode(model.config)) == model.config
    batch = images(channels=model.channels)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model.eval()(batch).total.item()
    with scope(0, "noise"):
        for _ in range(8):
            optimizer.zero_grad()
            model.train()(batch).total.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
    assert model.eval()(batch).total.item() < before
    codes = model.encode(batch.pixels)
    assert codes.shape[1:] == model.code_shape
    assert model.decode(codes).shape == batch.pixels.shape
    assert model.decode(codes).dtype == torch.uint8


def test_total_is_the_weighted_sum_of_its_parts():
    out = make(kl_div_loss_weight=0.3)(images())
    torch.testing.assert_close(out.total, sum(out.weights[name] * part for name, part in out.parts.items()))


def test_evaluation_mode_measures_the_tokenizer_itself():
    model = make(normalization=None).eval()
    batch = images()
    out = model(batch)
    hard = model.decode_to_unit_range(model.encode(batch.pixels))
    torch.testing.assert_close(out.parts["reconstruction"], nn.functional.mse_loss(hard, batch.pixels / 255))
    assert model(batch).total == out.total


def test_straight_through_decodes_one_hot_samples_and_reinmax_changes_only_gradients():
    logits = torch.randn(2, 5, 3, 3, generator=generator(0, "logits"), requires_grad=True)
    values, gradients = [], []
    for reinmax in (False, True):
        with scope(0, "noise"):
            sample = relaxed_sample(logits, 0.5, straight_through=True, reinmax=reinmax)
        (sample * torch.arange(5.0)[:, None, None]).sum().backward()
        values.append(sample.detach())
        gradients.append(logits.grad.clone())
        logits.grad = None
    torch.testing.assert_close(values[0], values[1])
    assert set(values[0].round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert not torch.allclose(*gradients)


def test_reinmax_gradient_equals_the_exact_gradient_on_a_quadratic():
    # ReinMax is exact in expectation for quadratic functions (Liu et al. 2023, theorem 3.1), straight-through is not.
    logits = torch.tensor([0.3, -0.5, 0.1], requires_grad=True)
    value = torch.tensor([1.0, -2.0, 0.5])

    def function(one_hot):
        return ((one_hot * value[:, None, None]).sum(dim=1) ** 2).sum()

    exact = torch.autograd.grad((logits.softmax(0) * value**2).sum(), logits)[0]
    draws = logits[None, :, None, None].expand(200_000, 3, 1, 1)
    estimates = {}
    for reinmax in (False, True):
        with scope(0, "noise"):
            sample = relaxed_sample(draws, 1.0, straight_through=True, reinmax=reinmax)
        estimates[reinmax] = torch.autograd.grad(function(sample), logits)[0] / len(draws)
    assert (estimates[True] - exact).abs().max() < 0.01
    assert (estimates[False] - exact).abs().max() > 0.05


def test_kl_is_averaged_over_the_batch():
    logits = torch.randn(2, 7, 4, 4, generator=generator(0, "logits"))
    q = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(logits.movedim(1, -1)))
    expected = torch.distributions.kl_divergence(q, uniform).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(kl_from_uniform(logits), expected)
    torch.testing.assert_close(kl_from_uniform(logits.repeat(4, 1, 1, 1)), expected)


def test_gumbel_noise_is_fp32_for_low_precision_logits():
    logits = torch.zeros(64, 1024, 4, 4, dtype=torch.bfloat16)
    with scope(0, "noise"):
        sample = relaxed_sample(logits, 1.0, straight_through=True, reinmax=False)
    assert sample.dtype == torch.float32
    assert abs(sample.argmax(dim=1).float().mean() - 511.5) < 40  # bf16 noise gives far lower ids


def test_the_model_follows_its_schedules():
    model = make(
        temperature={"kind": "exponential", "start": 1.0, "end": 0.25, "steps": 100},
        kl_div_loss_weight={"kind": "linear", "start": 0.0, "end": 0.2, "steps": 100},
    )
    assert (model.temperature, model.kl_div_loss_weight) == (1.0, 0.0)
    for _ in range(3):  # the same step again changes nothing
        model.anneal(50)
    assert (model.temperature, model.kl_div_loss_weight) == pytest.approx((0.5, 0.1))
    out = model(images())
    assert out.metrics["temperature"].item() == pytest.approx(0.5)
    assert out.weights["kl"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reinmax": True}, "set straight_through=true too"),
        ({"image_size": 20, "num_layers": 3}, "not a multiple of 2\\*\\*num_layers=8"),
        ({"smooth_l1_loss": True, "logit_laplace_loss": True, "normalization": None}, "choose one"),
        ({"logit_laplace_loss": True}, "set normalization=null"),
        ({"normalization": [[0.5], [0.5]]}, "fewer than channels=3"),
        ({"normalization": [[0.5] * 3, [0.0] * 3]}, "must be positive"),
        ({"temperature": 0.0}, "must stay above 0"),
        ({"temperature": {"kind": "linear", "start": 1.0, "end": 0.0, "steps": 9}}, "must stay above 0"),
        ({"kl_div_loss_weight": -1.0}, "must not be negative"),
        ({"channels": 2}, "channels: got 2"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"codebok_dim": 3}, "did you mean 'codebook_dim'"),
    ],
)
def test_options_are_honoured_or_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        decode(DiscreteVAEConfig, options)


def test_no_normalization_leaves_images_as_they_are():
    seen = []
    model = make(normalization=None)
    model.encoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = images()
    model(batch)
    torch.testing.assert_close(seen[0], batch.pixels / 255)


def test_only_bytes_count_as_images():
    model = make()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(DataError, match=r"takes \(3, 16, 16\) and torch.uint8"):
            model.check_pixels(torch.zeros(2, 3, 16, 16, dtype=dtype))
    with pytest.raises(DataError, match="shape \\(3, 32, 32\\)"):
        model(images(size=32))


def test_logit_laplace_is_a_density():
    x = torch.linspace(1e-4, 1 - 1e-4, 200_001, dtype=torch.float64)
    density = torch.stack([torch.exp(-logit_laplace_nll(x.new_tensor(0.4), x.new_tensor(-0.7), v)) for v in x[::400]])
    assert torch.trapezoid(density, x[::400]).item() == pytest.approx(1, abs=2e-3)
    values = torch.rand(10, generator=generator(0, "values"))
    torch.testing.assert_close(unsqueeze(squeeze(values)), values)


def test_train_flops_is_three_times_the_counted_forward():
    for options in ({}, {"num_resnet_blocks": 1}, {"num_layers": 1, "channels": 1}):
        model = make(**options)
        with FlopCounterMode(display=False) as counter:
            model(images(channels=model.channels))
        assert model.train_flops() * len(images()) == pytest.approx(3 * counter.get_total_flops())


def test_codebook_usage_counts_what_occurs_over_all_ranks():
    codes = torch.tensor([[[0, 0], [1, 1]]])
    usage = codebook_usage(codes, 4)
    assert {name: round(value.item(), 5) for name, value in usage.items()} == {
        "codebook_perplexity": 2.0,
        "codebook_used": 0.5,
        "codebook_dead": 2.0,
    }

    class OtherRankUsesTheRest(Collectives):
        def all_sum(self, local):
            return local + torch.tensor([0.0, 0.0, 2.0, 2.0])

    with using(OtherRankUsesTheRest()):
        assert codebook_usage(codes, 4)["codebook_perplexity"].item() == pytest.approx(4)


def test_parameters_are_read_only_inside_their_owners_forward():
    # As an engine does that partitions parameters: data is there only while the owner's forward runs.
    model = make(num_resnet_blocks=1)
    expected = make(num_resnet_blocks=1).eval()(images()).total
    model.eval()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        whole = {name: parameter.data for name, parameter in own.items()}

        def gather(module, _, own=own, whole=whole):
            for name, parameter in own.items():
                parameter.data = whole[name]

        def release(module, _, __, own=own):
            for parameter in own.values():
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(None, None, None)
    assert model(images()).total == expected


def test_codebook_reads_ids_and_their_one_hot_vectors_alike():
    codebook = Codebook(5, 3)
    ids = torch.tensor([[[0, 4], [2, 2]]])
    one_hot = nn.functional.one_hot(ids, 5).movedim(-1, 1).float()
    torch.testing.assert_close(codebook(ids), codebook(one_hot))


def test_original_reinmax_without_effect_is_dropped_and_unknown_arguments_named():
    assert not config_from_original(TINY | {"reinmax": True}).reinmax
    with pytest.raises(ConfigError, match=r"vae_params\.vgg: unknown key"):
        config_from_original(TINY | {"vgg": True})
