"""Discriminator, perceptual loss, adaptive weight and frozen encoder, each against something easier to believe."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from vqgan_models import CNN, RESIDUAL, VIT, images, make

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.rng import generator, scope
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.vqgan import perceptual
from tokscale.tokenizers.vqgan.adversary import last_layer_gradient, with_gradient
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.discriminator import AdversarialConfig, Discriminator, ImagePairBatch, gradient_penalty
from tokscale.tokenizers.vqgan.perceptual import PerceptualConfig, PerceptualLoss
from tokscale.train.adversarial import AdversarialTask

ADVERSARIAL = {"dim": 8, "layers": 2, "weight": 0.5}


def discriminator(**options) -> Discriminator:
    with scope(0, "discriminator"):
        return Discriminator(AdversarialConfig(**(ADVERSARIAL | options)), 3, 16)


def pairs() -> ImagePairBatch:
    real = 2 * images().pixels / 255 - 1
    noise = torch.randn(real.shape, generator=generator(0, "noise"))
    return ImagePairBatch(positions=torch.arange(4), real=real, rebuilt=real + 0.3 * noise)


def looking(judge: Discriminator):
    def look(rebuilt, real):
        rebuilt = rebuilt.clone().requires_grad_()
        value = judge.generator_loss(judge.score(rebuilt))
        return value.detach(), torch.autograd.grad(value, rebuilt)[0]

    return look


@pytest.mark.parametrize("network", [CNN, VIT, {"kind": "resnet", "dim": 8, "layers": 2}], ids=lambda n: n["kind"])
def test_the_adversarial_gradient_equals_that_of_one_graph(network):
    judge, batch = discriminator(), images()
    model = make(network=network, adversarial=ADVERSARIAL)
    plain = make(network=network, adversarial=ADVERSARIAL)
    model.adversary = looking(judge)
    out = model(batch)
    out.total.backward()
    assert all(parameter.grad is None for parameter in judge.parameters())

    # One graph through both networks, the adaptive weight by autograd at the last layer's weight.
    expected = plain(batch)
    plain.quantizer.load_state_dict(make(network=network).quantizer.state_dict())
    target = batch.pixels / 255
    quantized = plain.quantizer(plain.features(target))
    rebuilt = plain._images(plain._decoded(quantized.vectors)[1])
    fooled = judge.generator_loss(judge.score(2 * rebuilt - 1))
    visible = 2 * F.l1_loss(rebuilt, target)
    weight = plain.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (visible, fooled)]
    ratio = norms[0] / (norms[1] + 1e-4)
    total = visible + 0.25 * quantized.parts["commitment"] + 0.5 * ratio * fooled
    total.backward()
    torch.testing.assert_close(out.metrics["adaptive_weight"], ratio)
    torch.testing.assert_close(out.total, total)
    torch.testing.assert_close(out.total, sum(out.weights[name] * part for name, part in out.parts.items()))
    assert "adversarial" not in expected.parts
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(5, 3, 3, padding=1), nn.Conv2d(5, 3, 1), nn.ConvTranspose2d(5, 3, 4, stride=4)], ids=str
)
def test_the_last_layers_gradient_needs_no_weight(layer):
    hidden = torch.randn(2, 5, 4, 4, generator=generator(0, "hidden"))
    out = layer(hidden)
    gradient = torch.randn(out.shape, generator=generator(0, "gradient"))
    (expected,) = torch.autograd.grad(out, layer.weight, gradient)
    layer.weight = None
    torch.testing.assert_close(last_layer_gradient(layer, hidden, gradient), expected)


def test_a_number_carries_the_gradient_it_is_given():
    image = torch.randn(2, 3, 4, 4, generator=generator(0, "p")).requires_grad_()
    gradient = torch.randn(2, 3, 4, 4, generator=generator(0, "g"))
    value = with_gradient(image, torch.tensor(3.5), gradient)
    value.backward()
    assert value.item() == 3.5 and torch.equal(image.grad, gradient)


def test_a_constant_weight_and_the_bound_of_the_adaptive_one():
    judge, batch = discriminator(), images()
    for options, expected in (({"adaptive": False}, 1.0), ({"adaptive_max": 1e-3}, 1e-3)):
        model = make(adversarial=ADVERSARIAL | options)
        model.adversary = looking(judge)
        assert model(batch).metrics["adaptive_weight"] == pytest.approx(expected)


def test_a_discriminators_loss_is_bound_without_a_penalty_and_the_penalty_keeps_its_own_schedule():
    judge, batch = discriminator(gradient_penalty_weight=10.0, gradient_penalty_every=3), pairs()
    found = []
    for step in range(7):
        judge.anneal(step)
        out = judge(batch)
        found.append("gradient_penalty" in out.parts)
        torch.testing.assert_close(out.total, sum(out.weights[name] * part for name, part in out.parts.items()))
        out.total.backward()
        assert all(p.grad.isfinite().all() for p in judge.parameters())
    assert found == [True, False, False, True, False, False, True]
    without = discriminator()
    without.anneal(0)
    assert set(without(batch).parts) == {"discriminator"}


def test_the_quantizers_loss_counts_without_a_discriminator():
    out = make(quantizer=RESIDUAL)(images())
    assert out.weights["commitment"] == 0.25
    torch.testing.assert_close(out.total - out.parts["l1"], 0.25 * out.parts["commitment"], atol=1e-6, rtol=1e-4)


def test_the_gradient_penalty_equals_one_gradient_at_a_time():
    judge, batch = discriminator(), pairs()
    real = batch.real.clone().requires_grad_()
    found = gradient_penalty(real, judge.score(real))
    expected = []
    for image in batch.real:
        one = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(judge.score(one).sum(), one)
        expected.append((gradient.norm() - 1) ** 2)
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize(
    ("loss", "sure", "torn", "fooling"), [("hinge", 0.0, 1.0, -3.0), ("bce", 0.0485874, 0.6931472, 0.0485874)]
)
def test_the_losses_are_hinge_and_cross_entropy(loss, sure, torn, fooling):
    judge, high, zero = discriminator(loss=loss), torch.full((2, 1, 2, 2), 3.0), torch.zeros(2, 1, 2, 2)
    assert judge.loss(high, -high).item() == pytest.approx(sure, abs=1e-6)
    assert judge.loss(zero, zero).item() == pytest.approx(torn)
    assert judge.generator_loss(high).item() == pytest.approx(fooling, abs=1e-6)


def engine(name: str, make_model, steps: int, micro_batches: int = 1):
    return build_engine(
        name,
        make_model,
        config=EagerConfig(),
        optimizer=AdamWConfig(lr=3e-3, weight_decay=0.1),
        schedule=ScheduleConfig(),
        comm=Comm(ProcessEnv()),
        micro_batches=micro_batches,
        micro_batch_size=4 // micro_batches,
        total_steps=steps,
    )


def task(steps: int, *, start: int = 0, micro_batches: int = 1, **options) -> AdversarialTask:
    generating = engine("tokenizer", lambda: make(adversarial=ADVERSARIAL, **options), steps, micro_batches)
    judging = engine("discriminator", lambda: discriminator(gradient_penalty_weight=1.0), steps, micro_batches)
    return AdversarialTask(generating, judging, start_step=start, micro_batches=micro_batches)


def test_both_learn_from_the_start_step_on():
    trained, batch, results = task(16, start=3), images(), []
    before = {name: p.clone() for name, p in trained.engines["discriminator"].model.named_parameters()}
    for step in range(16):
        results.append(trained.step(batch, step))
        if step == 2:
            after = dict(trained.engines["discriminator"].model.named_parameters())
            assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [list(r.reports) for r in results[2:4]] == [["tokenizer"], ["tokenizer", "discriminator"]]
    assert "loss/adversarial" not in results[2].metrics and "loss/adversarial" in results[3].metrics
    first, last = results[3].metrics, results[-1].metrics
    assert last["discriminator/loss/discriminator"] < first["discriminator/loss/discriminator"]
    assert last["loss/l1"] < results[0].metrics["loss/l1"]
    assert trained.engines["tokenizer"].model.adversary is None  # nothing of the training is left in the codec


def test_micro_batches_give_the_discriminators_the_same_update():
    whole, split = task(2), task(2, micro_batches=2)
    for trained in (whole, split):
        trained.step(images(), 0)
    # The generator's codebook moves between micro batches and its adaptive weight is of each; the first
    # reconstructions are the same but for the second half's codebook, so the judges stay close.
    a, b = (dict(t.engines["discriminator"].model.named_parameters()) for t in (whole, split))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 2 * 3e-3


def test_a_frozen_encoder_neither_trains_nor_decays_and_keeps_ids_and_fingerprint():
    model = make(freeze_encoder=True, quantizer=RESIDUAL)
    trained = engine("tokenizer", lambda: model, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    print_before = FrozenImageTokenizer(make(quantizer=RESIDUAL)).fingerprint
    for step in range(6):
        out = trained(images())
        assert "commitment" not in out.parts
        trained.backward(out.total)
        trained.step(step)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    fixed = set(before) - moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved) and moved
    assert not any(name.startswith("decoder.") for name in fixed)
    assert model.training and not model.encoder.training and not model.quantizer.training
    assert FrozenImageTokenizer(model).fingerprint == print_before


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """Random weights under torchvision's names."""
    path, tensors, layer, width = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors", {}, 0, 3
    draw = generator(0, "vgg")
    for stage in perceptual.STAGES:
        for outputs in stage:
            tensors[f"features.{layer}.weight"] = torch.randn(outputs, width, 3, 3, generator=draw) / (3 * width**0.5)
            tensors[f"features.{layer}.bias"] = torch.randn(outputs, generator=draw) / 10
            layer, width = layer + 2, outputs
        layer += 1
    save_file(tensors | {"classifier.0.weight": torch.zeros(1)}, path)
    return path, tensors


def test_the_perceptual_loss_equals_a_loop_over_the_layers(vgg, tmp_path):
    path, tensors = vgg
    lpips = {f"lin{i}.model.1.weight": torch.rand(1, s[-1], 1, 1) for i, s in enumerate(perceptual.STAGES)}
    torch.save(lpips, tmp_path / "lpips.pth")
    loss = PerceptualLoss.from_files(PerceptualConfig(vgg=path, lpips=tmp_path / "lpips.pth"))
    a = torch.rand(2, 3, 16, 16, generator=generator(0, "a")).requires_grad_()
    b = torch.rand(2, 3, 16, 16, generator=generator(0, "b"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = ((v - mean[:, None, None]) / std[:, None, None] for v in (a, b))
    expected, layers = 0.0, iter(sorted({int(name.split(".")[1]) for name in tensors}))
    for index, stage in enumerate(perceptual.STAGES):
        if index:
            x, y = (F.max_pool2d(v, 2) for v in (x, y))
        for _ in stage:
            at = next(layers)
            x, y = (
                F.relu(F.conv2d(v, tensors[f"features.{at}.weight"], tensors[f"features.{at}.bias"], padding=1))
                for v in (x, y)
            )
        difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
        expected = expected + F.conv2d(difference.square(), lpips[f"lin{index}.model.1.weight"]).mean()
    found = loss(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0
    assert loss(b, b) == 0
    grey = PerceptualLoss.from_files(PerceptualConfig(vgg=path))
    assert grey(a[:, :1], b[:, :1]) > 0


def test_the_perceptual_loss_joins_the_total_but_not_the_codec(vgg):
    options = {"vgg": str(vgg[0]), "weight": 0.3}
    model = make(perceptual=options)
    assert "perceptual" not in model(images()).parts  # without weights nothing is read
    model.perceptual = PerceptualLoss.from_files(model.config.perceptual)
    out = model(images())
    assert out.weights["perceptual"] == 0.3
    torch.testing.assert_close(out.total, sum(out.weights[name] * part for name, part in out.parts.items()))
    assert not any("perceptual" in name for name in model.state_dict())


def test_weights_of_something_else_are_refused_by_name(vgg, tmp_path):
    path, tensors = vgg
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        PerceptualLoss.from_files(PerceptualConfig(vgg=tmp_path / "nowhere.pth"))
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "few.safetensors")
    with pytest.raises(CheckpointError, match=r"few.safetensors: has 1 convolutions.*VGG16 has 13"):
        PerceptualLoss.from_files(PerceptualConfig(vgg=tmp_path / "few.safetensors"))
    other = {name: torch.zeros(1, *value.shape[1:]) if value.ndim == 4 else value for name, value in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"convs.0.weight has shape \(1, 3, 3, 3\), VGG16 \(64, 3, 3, 3\)"):
        PerceptualLoss.from_files(PerceptualConfig(vgg=tmp_path / "other.safetensors"))
    save_file({"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "lin.safetensors")
    with pytest.raises(CheckpointError, match=r"lin.safetensors: no lin0.model.1.weight of 64 values"):
        PerceptualLoss.from_files(PerceptualConfig(vgg=path, lpips=tmp_path / "lin.safetensors"))


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match=r"adversarial.loss"):
        decode(VQGANConfig, {"adversarial": {"loss": "wasserstein"}})
