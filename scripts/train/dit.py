"""The network: a class-conditional diffusion transformer (DiT, Peebles & Xie 2023).

Differences from the paper: one adaLN projection is shared by all blocks, which add a learned table of
their own to it (adaLN-single, PixArt-alpha, Chen et al. 2023), and the network predicts the clean image x
and not the noise (Li & He 2025, "Back to basics"). This file is the reference that the Rust
implementation is held against, tensor by tensor.
"""

import json
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

FORMAT = "image-generator.dit"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Config:
    """Sizes of the network. All of them travel in the weights file's metadata."""

    image_size: int = 28
    channels: int = 1
    patch: int = 7
    width: int = 256
    depth: int = 5
    heads: int = 4
    mlp_width: int = 768
    freq_width: int = 256
    classes: int = 10

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def patch_width(self) -> int:
        return self.patch * self.patch * self.channels


@dataclass(frozen=True)
class Sampler:
    """Defaults of the Euler sampler, see `sample`."""

    steps: int = 4
    guidance: float = 1.5
    shift: float = 1.0


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)
        self.fc1 = nn.Linear(c.width, c.mlp_width)
        self.fc2 = nn.Linear(c.mlp_width, c.width)
        self.table = nn.Parameter(torch.zeros(6, c.width))

    def forward(self, x: torch.Tensor, ada: torch.Tensor) -> torch.Tensor:
        """x: [B, T, D]; ada: [B, 6, D], the shared projection of the condition."""
        b, t, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = (ada + self.table).unsqueeze(2).unbind(1)
        h = modulate(F.layer_norm(x, (d,), eps=1e-6), shift1, scale1)
        q, k, v = self.qkv(h).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = x + gate1 * self.proj(h)
        h = modulate(F.layer_norm(x, (d,), eps=1e-6), shift2, scale2)
        return x + gate2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    """Predicts the clean image. x_t: [B, C, H, W] in [-1, 1] + noise, t: [B] in [0, 1] (0 noise, 1 image),
    label: [B] in 0..=classes, where `classes` itself stands for "no class"."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.patch_in = nn.Linear(c.patch_width, c.width)
        self.position = nn.Parameter(torch.randn(c.tokens, c.width) * 0.02)
        self.label = nn.Embedding(c.classes + 1, c.width)
        self.time1 = nn.Linear(c.freq_width, c.width)
        self.time2 = nn.Linear(c.width, c.width)
        self.ada = nn.Linear(c.width, 6 * c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.out_table = nn.Parameter(torch.zeros(2, c.width))
        self.patch_out = nn.Linear(c.width, c.patch_width)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        nn.init.normal_(self.time1.weight, std=0.02)
        nn.init.normal_(self.time2.weight, std=0.02)
        for m in (self.ada, self.patch_out):
            nn.init.zeros_(m.weight)

    def frequencies(self, t: torch.Tensor) -> torch.Tensor:
        half = self.config.freq_width // 2
        w = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        a = 1000.0 * t.float()[:, None] * w
        return torch.cat([a.cos(), a.sin()], dim=1)

    def condition(self, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.time2(F.silu(self.time1(self.frequencies(t)))) + self.label(label)

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        c = self.config
        n = c.image_size // c.patch
        x = x.view(-1, c.channels, n, c.patch, n, c.patch)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, c.tokens, c.patch_width)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        c = self.config
        n = c.image_size // c.patch
        x = x.view(-1, n, n, c.patch, c.patch, c.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.channels, c.image_size, c.image_size)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor, trace=None) -> torch.Tensor:
        cond = self.condition(t, label)
        ada = self.ada(F.silu(cond)).view(-1, 6, self.config.width)
        h = self.patch_in(self.patchify(x)) + self.position
        for block in self.blocks:
            h = block(h, ada)
            if trace is not None:
                trace.append(h)
        shift, scale = (cond.unsqueeze(1) + self.out_table).unsqueeze(2).unbind(1)
        h = modulate(F.layer_norm(h, (self.config.width,), eps=1e-6), shift, scale)
        return self.unpatchify(self.patch_out(h))


def time_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 times from 0 (noise) to 1 (image); a shift above 1 spends more steps near the noise."""
    grid = []
    for i in range(steps + 1):
        noise = 1.0 - i / steps
        grid.append(1.0 - shift * noise / (1.0 + (shift - 1.0) * noise))
    return grid


@torch.inference_mode()
def sample(model, noise, label, sampler: Sampler, trace=None) -> torch.Tensor:
    """Euler steps along the flow, classifier-free guidance on the predicted image. noise: [B, C, H, W]."""
    x = noise
    grid = time_grid(sampler.steps, sampler.shift)
    none = torch.full_like(label, model.config.classes)
    for now, then in zip(grid, grid[1:]):
        t = torch.full((x.shape[0],), now, device=x.device)
        clean = model(x, t, label)
        if sampler.guidance != 1.0:
            free = model(x, t, none)
            clean = free + sampler.guidance * (clean - free)
        x = x + (then - now) / (1.0 - now) * (clean - x)
        if trace is not None:
            trace.append(x)
    return x


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to 0..=255, ink white."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def metadata(config: Config, sampler: Sampler, name: str, class_names: list[str]) -> dict[str, str]:
    """What a weights file says about itself: safetensors allows strings only."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "name": name,
        "config": json.dumps(asdict(config), separators=(",", ":")),
        "sampler": json.dumps(asdict(sampler), separators=(",", ":")),
        "classes": json.dumps(class_names, separators=(",", ":")),
    }


def load(path: str, device: str = "cpu") -> tuple[DiT, Sampler]:
    """Reads a weights file as `export` in train.py writes it, in float32."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = f.metadata()
        if meta.get("format") != FORMAT or meta.get("format_version") != str(FORMAT_VERSION):
            raise SystemExit(f"{path} is not a {FORMAT} file of version {FORMAT_VERSION}")
        model = DiT(Config(**json.loads(meta["config"])))
        model.load_state_dict({k: f.get_tensor(k).float() for k in f.keys()})
    return model.to(device).eval(), Sampler(**json.loads(meta["sampler"]))
