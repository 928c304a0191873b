"""Writes the tensors that the Rust implementation is held to.

    python scripts/train/golden.py --weights src/model/mnist.safetensors --out tests/golden

small.safetensors        a tiny model of random weights (3 channels, 3 classes), a valid weights file
small-golden.safetensors its inputs and outputs
mnist-golden.safetensors the same of the default weights

Tensors of a golden file, in float32 unless said otherwise:

    forward.x [B, C, H, W]   forward.t [B]   forward.label [B] (int64; `classes` itself is "no class")
    forward.block.{i} [B, T, D]              forward.output [B, C, H, W], the predicted clean picture
    sample.noise [B, C, H, W]                sample.label [B] (int64)
    sample.step.{i} [B, C, H, W], the state after step i, from 0; the last one is the end
    sample.bytes [B, C, H, W] (uint8)

Their metadata has `steps`, `guidance` and `shift` of the sampler and `weights_sha256` of the file that they belong
to, as text. All is computed in float32 on the CPU. Run it again whenever the default weights change.
"""

import argparse
import hashlib
import json
import os
import struct

import torch
from safetensors.torch import save

import dit

SMALL = dit.Config(image_size=12, channels=3, patch=4, width=32, depth=2, heads=2, mlp_width=48, freq_width=16, classes=3)
SMALL_SAMPLER = dit.Sampler(steps=4, guidance=1.7, shift=2.0)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", required=True, help="the default weights")
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=2026)
    return p.parse_args()


def write(path: str, tensors: dict[str, torch.Tensor], meta: dict[str, str]):
    """As safetensors' own save_file, which orders metadata by chance: here the same tensors are the same file."""
    raw = save(tensors, meta)
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(json.loads(raw[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def small_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random in every tensor, of a size that keeps activations near 1: a part left out shows."""
    tensors = {}
    for name, value in dit.DiT(SMALL).state_dict().items():
        scale = value.shape[1] ** -0.5 if value.ndim == 2 and name.endswith("weight") and name != "label.weight" else 0.3
        tensors[name] = (torch.randn(value.shape, generator=generator) * scale).half()
    return tensors


@torch.inference_mode()
def golden(path: str, times: list[float], labels: list[int], sample_labels: list[int], blocks: list[int], generator: torch.Generator) -> tuple[dict, dict]:
    model, sampler = dit.load(path)
    c = model.config
    picture = (c.channels, c.image_size, c.image_size)
    x = torch.randn(len(times), *picture, generator=generator)
    t, label = torch.tensor(times), torch.tensor(labels)
    trace, states = [], []
    out = {"forward.x": x, "forward.t": t, "forward.label": label, "forward.output": model(x, t, label, trace)}
    out |= {f"forward.block.{i}": trace[i] for i in blocks}
    noise, label = torch.randn(len(sample_labels), *picture, generator=generator), torch.tensor(sample_labels)
    end = dit.sample(model, noise, label, sampler, states)
    out |= {"sample.noise": noise, "sample.label": label, "sample.bytes": dit.to_bytes(end)}
    out |= {f"sample.step.{i}": state for i, state in enumerate(states)}
    assert all(v.isfinite().all() for v in out.values())
    with open(path, "rb") as f:
        meta = {"weights_sha256": hashlib.sha256(f.read()).hexdigest()} | {k: str(v) for k, v in vars(sampler).items()}
    return {k: v.contiguous() for k, v in out.items()}, meta


def main():
    a = arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.makedirs(a.out, exist_ok=True)
    place = lambda name: os.path.join(a.out, name)
    generator = torch.Generator().manual_seed(a.seed)

    write(place("small.safetensors"), small_weights(generator), dit.metadata(SMALL, SMALL_SAMPLER, "small", ["red", "green", "blue"]))
    tensors, meta = golden(place("small.safetensors"), [0.0, 0.3, 0.62, 0.95], [0, 2, SMALL.classes, 1], [0, 1, 2], [0, 1], generator)
    write(place("small-golden.safetensors"), tensors, meta)
    # Of the default model's blocks the first and the last: all of them would be a larger file, and no better test.
    depth = dit.load(a.weights)[0].config.depth
    tensors, meta = golden(a.weights, [0.0, 0.5, 0.75], [3, 10, 7], [0, 4, 8], [0, depth - 1], generator)
    write(place("mnist-golden.safetensors"), tensors, meta)
    for name in ("small.safetensors", "small-golden.safetensors", "mnist-golden.safetensors"):
        print(f"{os.path.getsize(place(name)):>9,} bytes  {name}")


if __name__ == "__main__":
    main()
