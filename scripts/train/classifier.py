"""The judge of drawn digits: a small convolutional network, trained on the MNIST training files alone.

It shares nothing with the model that it judges. Its penultimate features are what Frechet distances and
diversity are measured in.
"""

import math
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

import data

FEATURES = 64


class Classifier(nn.Module):
    """[B, 1, 28, 28] in [-1, 1] to 10 logits."""

    def __init__(self):
        super().__init__()
        widths = [(1, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)]
        layers = [(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, stride in widths]
        self.convolutions = nn.Sequential(*(part for layer in layers for part in layer))
        self.hidden = nn.Linear(96, FEATURES)
        self.last = nn.Linear(FEATURES, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.hidden(self.convolutions(x).mean((2, 3))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.features(x))


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turned by up to 11 degrees, scaled and sheared by up to a tenth, moved by up to 2 pixels; paper stays black."""
    r = torch.rand(len(x), 5, generator=generator) * 2 - 1
    angle, across, down, shear = 0.2 * r[:, 0], 1 + 0.1 * r[:, 1], 1 + 0.1 * r[:, 2], 0.1 * r[:, 3]
    move = (torch.rand(len(x), 2, generator=generator) * 2 - 1) * (2 / 14)
    top = torch.stack([across * angle.cos(), -angle.sin() + shear, move[:, 0]], 1)
    bottom = torch.stack([angle.sin(), down * angle.cos(), move[:, 1]], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


@torch.inference_mode()
def judge(model: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 1, 28, 28] as bytes to features [N, FEATURES] in float64, and labels [N]."""
    features = torch.cat([model.features(data.to_unit(part)) for part in images.split(500)])
    return features.double(), model.last(features).argmax(1)


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int, batch: int = 128) -> Classifier:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier().to(memory_format=torch.channels_last)
    steps = len(images) // batch * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
    step, started = 0, time.monotonic()
    for epoch in range(epochs):
        order, losses = torch.randperm(len(images), generator=generator), []
        for pick in order[: len(order) // batch * batch].split(batch):
            x = augment(data.to_unit(images[pick]), generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[pick], label_smoothing=0.02)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            losses.append(loss.item())
            if step % 100 == 0 or step == steps:
                left = (time.monotonic() - started) / step * (steps - step)
                print(f"classifier: step {step}/{steps}  epoch {epoch + 1}/{epochs}  loss {sum(losses) / len(losses):.4f}  {left / 60:.1f} min left", flush=True)
    return model.eval()


def load_or_train(folder: str, cache: str | None, epochs: int, seed: int) -> Classifier:
    """From the cache, if there is one; else trained, and put there."""
    if cache and os.path.exists(cache):
        model = Classifier()
        model.load_state_dict(torch.load(cache))
        return model.eval()
    model = train(*data.load(folder, "train"), epochs, seed)
    if cache:
        torch.save(model.state_dict(), cache + ".tmp")
        os.replace(cache + ".tmp", cache)
    return model


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of features, each taken for a normal distribution (Heusel et al. 2017).

    The trace of the root of a product of covariances is the sum of the roots of its eigenvalues, which are
    those of the symmetric root(A) B root(A)."""
    covariances = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross).item()


def spread(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean distance of two digits of one class, averaged over classes; nan where a class has less than two."""
    means = [torch.pdist(features[labels == label]).mean().item() for label in range(10)]
    return math.fsum(means) / len(means)
