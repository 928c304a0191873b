"""What distill.py measures digits with: an encoder of its own, and a discriminator that starts as a copy of it.

Neither shares anything with the classifier that judges (classifier.py): other layers, another task, another seed.
Both see the MNIST training files alone.
"""

import os
import time

import torch
import torch.nn.functional as F
from torch import nn

import data
from classifier import augment

WIDTH = 128


class Trunk(nn.Module):
    """[B, 1, 28, 28] in [-1, 1] to maps [B, 64, 7, 7] and [B, 128, 4, 4], and a vector [B, WIDTH].

    Without normalisation layers, so that one digit's features do not depend on those beside it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 4, 2, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 2, 1)
        self.conv3 = nn.Conv2d(64, 64, 3, 1, 1)
        self.conv4 = nn.Conv2d(64, 128, 3, 2, 1)
        self.full = nn.Linear(128 * 16, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(h), 0.2)
        middle = F.leaky_relu(self.conv3(h), 0.2)
        coarse = F.leaky_relu(self.conv4(middle), 0.2)
        return middle, coarse, F.leaky_relu(self.full(coarse.flatten(1)), 0.2)


class Encoder(nn.Module):
    """Trained to name a digit and to draw it again: its features know both the class and the hand."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.name = nn.Linear(WIDTH, 10)
        self.redraw = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, 784))

    def loss(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        vector = self.trunk(x)[2]
        return F.cross_entropy(self.name(vector).float(), label) + 2 * (self.redraw(vector).float() - x.flatten(1)).square().mean()


class Discriminator(nn.Module):
    """One number a digit: how real, given its class (projection, Miyato & Koyama 2018)."""

    def __init__(self, trunk: Trunk):
        super().__init__()
        self.trunk = Trunk()
        self.trunk.load_state_dict(trunk.state_dict())
        self.last = nn.Linear(WIDTH, 1)
        self.label = nn.Embedding(10, WIDTH)
        nn.init.normal_(self.label.weight, std=WIDTH**-0.5)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        vector = self.trunk(x)[2]
        return (self.last(vector) + (vector * self.label(label)).sum(1, keepdim=True)).float().squeeze(1)


def features(trunk: Trunk, x: torch.Tensor) -> list[torch.Tensor]:
    """Pixels, both maps (3 x 3 and 2 x 2 after pooling) and the vector, each flat: [B, n]."""
    middle, coarse, vector = trunk(x)
    return [x.flatten(1), F.avg_pool2d(middle, 3, 2).flatten(1), F.avg_pool2d(coarse, 2).flatten(1), vector]


def load_or_train(path: str, images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int, batch: int = 128) -> Encoder:
    """Images as bytes. Kept under `path`, and taken from there the next time."""
    torch.manual_seed(seed)
    model = Encoder().to(images.device)
    if os.path.exists(path):
        model.load_state_dict(torch.load(path))
        return model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // batch * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.2)
    step, started, total = 0, time.monotonic(), 0.0
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for pick in order[: len(order) // batch * batch].split(batch):
            x = augment(data.to_unit(images[pick]), generator)
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = model.loss(x, labels[pick])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step, total = step + 1, total + loss.item()
            if step % 200 == 0 or step == steps:
                left = (time.monotonic() - started) / step * (steps - step)
                print(f"encoder: step {step}/{steps}  loss {total / 200:.4f}  {left / 60:.1f} min left", flush=True)
                total = 0.0
    torch.save(model.state_dict(), path + ".tmp")
    os.replace(path + ".tmp", path)
    return model.eval().requires_grad_(False)
