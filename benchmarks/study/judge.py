"""The quality of a model: its denoising loss on held-out images, and a Frechet distance of its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels.files import expecting, read_tensors, write_tensors
from examples import digits


class Images(NamedTuple):
    """Images [M, 1, size, size] in [-1, 1] and their classes [M]."""

    images: Tensor
    labels: Tensor


def split(images: Tensor, labels: Tensor) -> tuple[Images, Images]:
    """Split images into four fifths for training and one fifth held out, always in the same way."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    held_out, training = order[: len(images) // 5], order[len(images) // 5 :]
    return Images(images[training], labels[training]), Images(images[held_out], labels[held_out])


class Classifier(nn.Module):
    """A small convolutional network; the 64 activations before its last layer are the features of the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 64), nn.ReLU()),
        )
        self.classify = nn.Linear(64, digits.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights that this study has stored.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming the file, if it holds anything else.
    """
    advice = "delete it, and the same command trains it again"
    with expecting("the weights of this model", path, advice):
        model.load_state_dict(read_tensors(path, next(model.parameters()).device))


def trained_classifier(training: Images, path: Path, epochs: int) -> Classifier:
    """Load the classifier in the file at ``path``; if there is none, train one on these images and save it there."""
    torch.manual_seed(0)
    classifier = Classifier().to(training.images.device)
    if path.exists():
        load_weights(classifier, path)
        return classifier.eval()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(training.labels)).split(64):
            images, labels = (tensor[chosen.to(tensor.device)] for tensor in training)
            optimizer.zero_grad()
            F.cross_entropy(classifier(images), labels).backward()
            optimizer.step()
    write_tensors(classifier.state_dict(), path)
    return classifier.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of normals fitted to features [M, D] and [N, D].

    (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric. Computed in fp64.
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    between = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * between
    return distance.item()


class Judge:
    """Judges all models with the same noise, so that differences come only from the models.

    Args:
        training, held_out: the images.
        classifier: see ``trained_classifier``.
        samples: images to draw from a model, a multiple of ten, with equally many of each class.
        sampling_steps: of DDIM.
        timesteps: int [n], at which the denoising loss is computed.
    """

    def __init__(
        self,
        training: Images,
        held_out: Images,
        classifier: Classifier,
        samples: int,
        sampling_steps: int,
        timesteps: Tensor,
    ) -> None:
        self.held_out = held_out
        self.classifier = classifier
        self.sampling_steps = sampling_steps
        self.timesteps = timesteps
        device = training.images.device
        self.classes = torch.arange(digits.CLASSES, device=device).repeat(samples // digits.CLASSES)
        self._real = self._features(training.images)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images that the classifier assigns to their classes."""
        return (self.classifier(images).argmax(1) == labels).double().mean().item()

    def distance_of_images(self, images: Tensor) -> float:
        """Return the Frechet distance between the features of these images and of the training images.

        It is larger for fewer images, whatever they show, so only distances of equally many can be compared.
        """
        return frechet_distance(self._features(images), self._real)

    def draw(self, model: Any) -> Tensor:
        """Draw equally many images of each class, [samples, 1, size, size]."""
        torch.manual_seed(1)
        size = self.held_out.images.shape[-1]
        return digits.sample(model, self.classes, size=size, steps=self.sampling_steps)

    @torch.no_grad()
    def losses(self, model: Any) -> Tensor:
        """Return the denoising loss at each of the timesteps, [n], on the held-out images."""
        images, labels = self.held_out
        found = []
        for t in self.timesteps.tolist():
            torch.manual_seed(2 + t)
            times = torch.full((len(images),), t, device=images.device)
            x, velocity = digits.noisy(images, times)
            found.append((model(x, t, labels) - velocity).square().mean())
        return torch.stack(found).double().cpu()
