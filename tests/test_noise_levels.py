"""Weights by noise level: against numbers computed by hand, at the ends of the SNR, and what is learned."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused

import dtr_kernels as dtr

INF = math.inf
SNRS = [0.0, 0.25, 4.0, 9.0, INF]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("eps", [1, 1, 1, 5 / 9, 0]),
        ("x0", [0, 0.25, 4, 5, 5]),
        ("v", [0, 0.25 / 1.25, 4 / 5, 5 / 10, 0]),
        ("flow", [0, 0.25 / 2.25, 4 / 9, 5 / 16, 0]),
    ],
)
def test_min_snr(device, prediction, expected, dtype):
    snr = torch.tensor(SNRS, dtype=dtype, device=device)
    weights = dtr.min_snr_weights(snr, prediction)
    assert weights.dtype == dtype and weights.device == snr.device
    torch.testing.assert_close(weights.cpu(), torch.tensor(expected, dtype=dtype))
    assert torch.equal(dtr.min_snr_weights(snr[:, None], prediction), weights[:, None])
    assert torch.equal(dtr.min_snr_weights(snr, "x0", 2).cpu(), torch.tensor([0, 0.25, 2, 2, 2], dtype=dtype))


@pytest.mark.parametrize("prediction, error", [("eps", 65504), ("x0", 1), ("v", 65505), ("flow", 256.94**2)])
def test_the_largest_snr_of_fp16(prediction, error):
    found = dtr.min_snr_weights(torch.tensor(65504, dtype=torch.float16), prediction)
    torch.testing.assert_close(found.item(), 5 / error, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "prediction, expected", [("eps", [1, 1]), ("x0", [4, 9]), ("v", [0.8, 0.9]), ("flow", [4 / 9, 9 / 16])]
)
@pytest.mark.parametrize("gamma, dtype", [(1e6, torch.float16), (1e300, torch.float32)], ids=str)
def test_a_gamma_beyond_the_dtype(prediction, expected, gamma, dtype):
    found = dtr.min_snr_weights(torch.tensor([4, 9], dtype=dtype), prediction, gamma)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize(
    "weights, expected",
    [
        (dtr.min_snr_weights, [0, 0, 0, -5 / 81, 0]),
        (lambda snr: dtr.min_snr_weights(snr, "x0"), [1, 1, 1, 0, 0]),
        (lambda snr: dtr.min_snr_weights(snr, "v"), [1, 0.64, 0.04, -5 / 100, 0]),
        (dtr.p2_weights, [-1, -0.64, -0.04, -1 / 100, 0]),
    ],
    ids=["eps", "x0", "v", "p2"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_of_weights(device, weights, expected, dtype):
    snr = torch.tensor(SNRS, dtype=dtype, device=device, requires_grad=True)
    weights(snr).sum().backward()
    torch.testing.assert_close(snr.grad.cpu(), torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("weights", [dtr.min_snr_weights, dtr.p2_weights, dtr.NoiseLevelUncertainty().log_variances])
def test_compiled(weights):
    compiled, snr = torch.compile(weights, fullgraph=True, backend="aot_eager"), torch.tensor([0.5, 3])
    torch.testing.assert_close(compiled(snr), weights(snr))
    with pytest.raises(RuntimeError, match=r"snr must be in 0\.\.inf"):
        compiled(-snr)


def test_p2(device):
    snr = torch.tensor(SNRS, dtype=torch.float64, device=device)
    for k, gamma, expected in (1, 1, [1, 0.8, 0.2, 0.1, 0]), (4, 0.5, [0.5, 4.25**-0.5, 8**-0.5, 13**-0.5, 0]):
        found = dtr.p2_weights(snr, k, gamma)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64, device=device))


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_same_loss_whatever_is_predicted(seed, prediction):
    """A wrong x_0 is a wrong eps, v or flow of the same x_t; their weighted errors are those of x_0."""
    t = 0.05 + 0.9 * torch.rand(50, dtype=torch.float64)
    alpha, sigma = (1 - t, t) if prediction == "flow" else ((math.pi / 2 * t).cos(), (math.pi / 2 * t).sin())
    snr = (alpha / sigma).square()
    x0, eps, error = torch.randn(3, 50, dtype=torch.float64)
    x = alpha * x0 + sigma * eps
    predicted = x0 + error, (x - alpha * (x0 + error)) / sigma
    meant = {
        "eps": lambda x0, eps: eps,
        "v": lambda x0, eps: alpha * eps - sigma * x0,
        "flow": lambda x0, eps: eps - x0,
    }
    squares = (meant[prediction](*predicted) - meant[prediction](x0, eps)).square()
    expected = dtr.min_snr_weights(snr, "x0") * error.square()
    torch.testing.assert_close(dtr.min_snr_weights(snr, prediction) * squares, expected)


def test_uncertainty_starts_with_the_losses_as_they_are(seed, device):
    weighting, losses = dtr.NoiseLevelUncertainty().to(device), torch.rand(5, device=device)
    assert torch.equal(weighting(losses, torch.tensor(SNRS, device=device)), losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uncertainty_as_it_is_written(seed, device, dtype):
    weighting = dtr.NoiseLevelUncertainty(16).to(device, dtype)
    torch.nn.init.normal_(weighting.weight)
    sigma, losses = torch.rand(2, 6, dtype=dtype, device=device) + 0.01
    assert weighting.phases.min() >= 0 and weighting.phases.max() < 2 * math.pi
    for b in range(6):
        x = math.log(sigma[b]) / 4
        parts = zip(weighting.weight.tolist(), weighting.frequencies, weighting.phases, strict=True)
        u = sum(w * math.sqrt(2) * math.cos(f * x + p) for w, f, p in parts)
        expected = losses[b].item() / math.exp(u) + u
        found = weighting(losses, sigma**-2)[b]
        assert found.dtype == dtype and found.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_gradients_of_uncertainty(seed):
    weighting = dtr.NoiseLevelUncertainty(8).double()
    losses, snr = torch.rand(4, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def weighted(weight, losses):
        return torch.func.functional_call(weighting, {"weight": weight}, (losses, snr))

    assert torch.autograd.gradcheck(weighted, (weight, losses))


def test_uncertainty_of_pure_noise_and_of_none(seed):
    weighting, snr = dtr.NoiseLevelUncertainty(), torch.tensor([0.0, INF], requires_grad=True)
    torch.nn.init.normal_(weighting.weight)
    losses = weighting(torch.ones(2), snr)
    losses.sum().backward()
    assert losses.isfinite().all() and weighting.weight.grad.isfinite().all() and snr.grad.tolist() == [0, 0]
    torch.testing.assert_close(losses, weighting(torch.ones(2), torch.tensor([0.0, INF]).clamp(1e-20, 1e20)))


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_uncertainty_is_computed_in_fp32(seed, narrow):
    weighting, snr = dtr.NoiseLevelUncertainty(), torch.rand(5)
    torch.nn.init.normal_(weighting.weight)
    expected = weighting(torch.ones(5), snr)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weighting(torch.ones(5, dtype=narrow), snr), expected)
    assert weighting.to(narrow)(torch.ones(5, dtype=narrow), snr.to(narrow)).dtype == torch.float32


def test_log_variances_of_any_shape(seed):
    weighting, snr = dtr.NoiseLevelUncertainty(), torch.rand(3, 1, 2)
    torch.nn.init.normal_(weighting.weight)
    found = weighting.log_variances(snr)
    assert torch.equal(found.flatten(), weighting.log_variances(snr.flatten())) and found.shape == snr.shape


def test_uncertainty_learns_the_losses(seed):
    """At the least loss / exp(u) + u, exp(u) is the loss."""
    weighting = dtr.NoiseLevelUncertainty()
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.01)
    snr = torch.logspace(-3, 3, 32)
    losses = 0.01 + 1 / (1 + snr)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses, snr).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variances(snr).exp(), losses, rtol=0.3, atol=0)


def test_checkpoints_hold_the_features(seed):
    first, second = dtr.NoiseLevelUncertainty(), dtr.NoiseLevelUncertainty()
    torch.nn.init.normal_(first.weight)
    snr = torch.rand(3)
    assert not torch.equal(first.frequencies, second.frequencies)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.log_variances(snr), second.log_variances(snr))


ONE = torch.ones(2)


@pytest.mark.parametrize("weights", [dtr.min_snr_weights, dtr.p2_weights, dtr.NoiseLevelUncertainty().log_variances])
@pytest.mark.parametrize(
    "snr, error, fragments",
    [
        (torch.tensor([1, -0.5]), ValueError, ["snr must be in 0..inf", "log SNR", "from -0.5 to 1"]),
        (torch.tensor([1, math.nan]), ValueError, ["snr must be in 0..inf", "nan"]),
        (torch.tensor([1]), TypeError, ["snr must be a floating-point tensor", "torch.int64"]),
        (2.0, TypeError, ["snr must be a floating-point tensor", "float"]),
    ],
    ids=str,
)
def test_bad_snr(weights, snr, error, fragments):
    refused(lambda: weights(snr), error, fragments)


@pytest.mark.parametrize(
    "call, error, fragments",
    [
        (lambda: dtr.min_snr_weights(ONE, "noise"), ValueError, ["prediction must be one of 'eps', 'x0', 'v', 'flow'"]),
        (lambda: dtr.min_snr_weights(ONE, ["v"]), ValueError, ["prediction must be one of", "got ['v']"]),
        (lambda: dtr.min_snr_weights(ONE, gamma=0), ValueError, ["gamma must be a finite number above 0", "got 0"]),
        (lambda: dtr.min_snr_weights(ONE, gamma="5"), TypeError, ["gamma must be a number", "'5'"]),
        (lambda: dtr.p2_weights(ONE, k=-1), ValueError, ["k must be a finite number above 0", "got -1"]),
        (lambda: dtr.p2_weights(ONE, gamma=math.inf), ValueError, ["gamma must be", "got inf"]),
        (lambda: dtr.NoiseLevelUncertainty(0), ValueError, ["channels must be at least 1"]),
        (lambda: dtr.NoiseLevelUncertainty()(ONE, torch.ones(3)), ValueError, ["losses and snr must", "[2] and [3]"]),
        (lambda: dtr.NoiseLevelUncertainty()([1.0, 1.0], ONE), TypeError, ["losses must be a tensor [B]", "got list"]),
        (lambda: dtr.NoiseLevelUncertainty()(ONE, 1.0), TypeError, ["snr must be a floating-point tensor", "float"]),
        (lambda: dtr.NoiseLevelUncertainty()(ONE.sum(), ONE), ValueError, ["losses and snr must", "[] and [2]"]),
    ],
)
def test_bad_arguments(call, error, fragments):
    refused(call, error, fragments)
