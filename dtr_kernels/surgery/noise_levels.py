"""Weights of losses by noise level: fixed ones, and learned ones that need no clusters.

All take the signal-to-noise ratio of each sample, SNR = alpha^2 / sigma^2 with x_t = alpha x_0 + sigma eps: alpha_bar /
(1 - alpha_bar) in DDPM's notation, ((1 - t) / t)^2 in flow matching, 1 / sigma^2 for EDM's noise levels. It may be 0,
for pure noise, and inf, for no noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dtr_kernels.quoting import quoted
from dtr_kernels.routing import check_count, check_number, check_range

# Weights of the squared error of each prediction, written so that eps avoids 0 / 0 for pure noise, and flow an overflow
# of fp16.
_MIN_SNR = {
    "eps": lambda snr, gamma: gamma / snr.clamp(min=gamma),
    "x0": lambda snr, gamma: snr.clamp(max=gamma),
    "v": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    "flow": lambda snr, gamma: (snr.clamp(max=gamma).sqrt() / (snr.sqrt() + 1)).square(),
}
# SNRs are clamped to these, so that the logarithms of 0 and inf, and their gradients, are finite.
_SNR_LIMITS = math.exp(-40), math.exp(40)


def min_snr_weights(snr: Tensor, prediction: str = "eps", gamma: float = 5.0) -> Tensor:
    """Return the weights of Min-SNR-gamma, factors of the losses (Hang et al., 2023, section 3.4).

    The squared error of x_0 has weight min(SNR, gamma). For a model with another prediction the same loss has weight

    - "eps": min(SNR, gamma) / SNR;
    - "x0": min(SNR, gamma);
    - "v": min(SNR, gamma) / (SNR + 1), for v = alpha eps - sigma x_0;
    - "flow": min(SNR, gamma) / (sqrt(SNR) + 1)^2, for flow matching's eps - x_0. It is not in the paper, but follows in
      the same way: eps - x_0 is (x_t - x_0) / t, and 1 / t = sqrt(SNR) + 1.

    Args:
        snr: floating-point, of any shape, from 0 to inf.
        prediction: the model's prediction, whose squared error is the loss: "eps", "x0", "v" or "flow".
        gamma: above 0.

    Returns:
        Weights of snr's shape and dtype.

    Raises:
        TypeError: if snr is not a floating-point tensor, or gamma not a number.
        ValueError: if snr is negative or NaN (in compiled code a RuntimeError, on a GPU a device-side assertion, so
            that nothing waits), prediction is unknown, or gamma is not above 0.
    """
    _check_snr(snr)
    if prediction not in list(_MIN_SNR):
        raise ValueError(f"prediction must be one of {', '.join(map(repr, _MIN_SNR))}, got {quoted(prediction)}")
    return _MIN_SNR[prediction](snr, min(_positive("gamma", gamma), torch.finfo(snr.dtype).max))


def p2_weights(snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return the weights of P2 for the squared error of eps, 1 / (k + SNR)^gamma (Choi et al., 2022).

    Args:
        snr: floating-point, of any shape, from 0 to inf.
        k: above 0; 1 in the paper.
        gamma: above 0; 0.5 and 1 in the paper.

    Returns:
        Weights of snr's shape and dtype.

    Raises:
        TypeError: if snr is not a floating-point tensor, or k or gamma not a number.
        ValueError: if snr is negative or NaN (as in ``min_snr_weights``), or k or gamma is not above 0.
    """
    _check_snr(snr)
    return (_positive("k", k) + snr) ** -_positive("gamma", gamma)


class NoiseLevelUncertainty(nn.Module):
    """A learned log-variance u of the loss at every noise level (EDM2, Karras et al., 2024, config B).

    ``UncertaintyWeighting`` learns one for each cluster, this module a function of all noise levels: a linear layer
    without bias on Fourier features of x = log(sigma) / 4, which are sqrt(2) cos(2 pi (f x + p)) with random
    frequencies f ~ N(0, 1) and phases p ~ U(0, 1) that stay fixed. Here sigma is 1 / sqrt(SNR), and the layer starts at
    0, where the losses are unchanged; EDM2's layer is normalised. Train it along with the model, without weight decay.

    Args:
        channels: number of features.

    Raises:
        TypeError: if channels is not an integer.
        ValueError: if it is less than 1.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        channels = check_count("channels", channels)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))
        self.weight = nn.Parameter(torch.zeros(channels))

    def log_variances(self, snr: Tensor) -> Tensor:
        """Return u at each noise level, of snr's shape and at least fp32."""
        _check_snr(snr)
        wide = snr.to(torch.promote_types(snr.dtype, torch.float32))
        log_sigma = -0.5 * wide.clamp(*_SNR_LIMITS).log()
        features = math.sqrt(2) * torch.cos(log_sigma[..., None] / 4 * self.frequencies + self.phases)
        return (features * self.weight).sum(-1)  # autocast would compute a matrix product in 16 bits

    def forward(self, losses: Tensor, snr: Tensor) -> Tensor:
        """Return the losses to differentiate, loss / exp(u) + u, of each sample.

        Args:
            losses: [B].
            snr: floating-point [B], from 0 to inf.

        Returns:
            [B], at least fp32.

        Raises:
            TypeError: if losses is not a tensor, or snr not a floating-point tensor.
            ValueError: if the shapes are not [B], or snr is negative or NaN (as in ``min_snr_weights``).
        """
        u = self.log_variances(snr)
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses must be a tensor [B], a loss of each sample, got {type(losses).__name__}")
        if losses.dim() != 1 or losses.shape != snr.shape:
            raise ValueError(
                "losses and snr must have shape [B], a loss and an SNR of each sample, got "
                f"{list(losses.shape)} and {list(snr.shape)}"
            )
        return losses * torch.exp(-u) + u


def _check_snr(snr: object) -> None:
    if not isinstance(snr, Tensor) or not snr.is_floating_point():
        given = getattr(snr, "dtype", type(snr).__name__)
        raise TypeError(f"snr must be a floating-point tensor of signal-to-noise ratios, got {given}")
    check_range(snr, math.inf, "of a log SNR give the exponential", "snr")


def _positive(name: str, value: object) -> float:
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {quoted(value)}")
    return number
