"""Writes a large weights file that draws the same digits as a small one.

    python3 tests/bench/large_model.py --out large.safetensors                  # about 700 MB, f16
    python3 tests/bench/large_model.py --out large.safetensors --mb 700 --dtype f32
    python3 tests/bench/large_model.py --out large.safetensors --depth 64

So that size can be tested with a picture at the end. Blocks are added until the file has the size, and each of them
adds exactly zero to its input, for any input: its values (the last third of `qkv`) are zero, and so is what its
attention hands to `proj`; its MLP's biases are so far below zero that GELU answers zero to everything. All other
weights of an added block are random, nine tenths of its bytes, so neither a compressing store nor a page cache that
merges pages gets it for less than its size, and a network that skipped or mixed up an added block's tensors would
show. The blocks of the small model come first, and nothing of them is changed but the number format.

The same arguments give the same bytes: `--seed` fixes the random numbers. One block at a time is in memory. Standard
library only.
"""

import argparse
import hashlib
import json
import os
import random
import struct

HERE = os.path.dirname(os.path.abspath(__file__))
BUILT_IN = os.path.join(HERE, "..", "..", "src", "model", "mnist.safetensors")
WIDTH_BYTES = {"F16": 2, "F32": 4}
# Sign and mantissa are random, the exponent is not: values of 2^-6 to 2^-5, of either sign.
RANDOM_BITS = {"F16": (0x83FF, 0x2400), "F32": (0x807FFFFF, 0x3C800000)}
# GELU(tanh) is exactly zero from about -10 on, and no input of a normed row brings this anywhere near.
OFF = -1000.0
DEPTH_MAX = 1024


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    p.add_argument("--weights", default=BUILT_IN, help="the small model (default: the built-in one)")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--mb", type=float, default=700, help="size of the file in millions of bytes; it ends with the last whole block")
    size.add_argument("--depth", type=int, help="blocks in all, in place of a size")
    p.add_argument("--dtype", choices=["f16", "f32"], default="f16")
    p.add_argument("--seed", type=int, default=2026)
    return p.parse_args()


def read(path: str) -> tuple[dict, dict[str, tuple[str, list[int], bytes]]]:
    """Metadata, and dtype, shape and bytes of each tensor."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header, data = json.loads(f.read(length)), f.read()
    meta = header.pop("__metadata__")
    return meta, {n: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for n, t in header.items()}


def converted(name: str, old: str, raw: bytes, new: str) -> bytes:
    if old == new:
        return raw
    if (old, new) != ("F16", "F32"):
        raise SystemExit(f"{name} is {old}: only F16 can be written as another format, and only as F32")
    n = len(raw) // 2
    return struct.pack(f"<{n}f", *struct.unpack(f"<{n}e", raw))


def noise(generator: random.Random, n: int, dtype: str) -> bytes:
    size = WIDTH_BYTES[dtype]
    keep, add = (int.from_bytes(bits.to_bytes(size, "little") * n, "little") for bits in RANDOM_BITS[dtype])
    return (int.from_bytes(generator.randbytes(size * n), "little") & keep | add).to_bytes(size * n, "little")


def constant(value: float, n: int, dtype: str) -> bytes:
    return struct.pack("<e" if dtype == "F16" else "<f", value) * n


def block_shapes(config: dict) -> dict[str, list[int]]:
    d, m = config["width"], config["mlp_width"]
    shapes = {"table": [6, d]}
    for name, output, inputs in (("qkv", 3 * d, d), ("proj", d, d), ("fc1", m, d), ("fc2", d, m)):
        shapes |= {f"{name}.weight": [output, inputs], f"{name}.bias": [output]}
    return shapes


def count(shape: list[int]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def added(name: str, shape: list[int], dtype: str, generator: random.Random) -> bytes:
    """A tensor of an added block, see the top of this file."""
    n = count(shape)
    if name.startswith("qkv."):
        return noise(generator, n // 3 * 2, dtype) + constant(0, n // 3, dtype)
    if name in ("proj.bias", "fc2.bias"):
        return constant(0, n, dtype)
    if name == "fc1.bias":
        return constant(OFF, n, dtype)
    return noise(generator, n, dtype)


def main():
    a = arguments()
    dtype = a.dtype.upper()
    meta, tensors = read(a.weights)
    config = json.loads(meta["config"])
    shapes = block_shapes(config)
    small, size = config["depth"], WIDTH_BYTES[dtype]
    block_bytes = size * sum(map(count, shapes.values()))
    small_bytes = size * sum(count(shape) for _, shape, _ in tensors.values())
    depth = a.depth if a.depth else small + max(0, round((a.mb * 1e6 - small_bytes) / block_bytes))
    if not small <= depth <= DEPTH_MAX:
        raise SystemExit(f"that would be {depth} blocks, the format allows {small} to {DEPTH_MAX}")

    meta |= {"config": json.dumps(config | {"depth": depth}, separators=(",", ":")), "name": f"{meta.get('name', 'model')}-large"}
    entries = [(name, shape) for name, (_, shape, _) in tensors.items()]
    entries += [(f"blocks.{i}.{name}", shape) for i in range(small, depth) for name, shape in shapes.items()]
    header, at = {"__metadata__": dict(sorted(meta.items()))}, 0
    for name, shape in entries:
        end = at + size * count(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    # A file that was not finished does not have the name.
    partial = a.out + ".partial"
    with open(partial, "wb") as f:

        def write(raw: bytes):
            digest.update(raw)
            f.write(raw)

        write(struct.pack("<Q", len(text)) + text)
        for name, (old, _, raw) in tensors.items():
            write(converted(name, old, raw, dtype))
        for i in range(small, depth):
            generator = random.Random(f"{a.seed} {i}")
            for name, shape in shapes.items():
                write(added(name, shape, dtype, generator))
    os.replace(partial, a.out)
    print(f"{a.out}: {os.path.getsize(a.out):,} bytes, {dtype}, {depth} blocks, sha256 {digest.hexdigest()}")


if __name__ == "__main__":
    main()
