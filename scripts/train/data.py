"""MNIST in its own IDX format, zipped or not."""

import gzip
import os
import struct

import torch

FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}


def read_idx(path: str) -> torch.Tensor:
    """One IDX file of unsigned bytes, as the tensor that its header describes."""
    if os.path.exists(path):
        raw = open(path, "rb").read()
    elif os.path.exists(path + ".gz"):
        raw = gzip.open(path + ".gz", "rb").read()
    else:
        raise SystemExit(f"neither {path} nor {path}.gz exists")
    zero, kind, rank = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != 8:
        raise SystemExit(f"{path} is not an IDX file of bytes")
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return torch.frombuffer(bytearray(raw[4 + 4 * rank :]), dtype=torch.uint8).view(shape)


def load(folder: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 1, 28, 28] as bytes, and labels [N]."""
    images, labels = (read_idx(os.path.join(folder, f)) for f in FILES[split])
    return images.unsqueeze(1), labels.long()


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """0..=255 to [-1, 1]."""
    return images.float() / 127.5 - 1
