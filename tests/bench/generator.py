"""Digits a second and latency of the generator itself, against PyTorch and onnxruntime with the same weights.

    cargo build --release --example generator
    pip install -r tests/bench/requirements.txt
    python tests/bench/generator.py

Everyone draws from noise to pixels, with the same number of threads and steps, and no HTTP. Only one side computes at any
moment; in each round all take turns, in the opposite order every other round. PyTorch's sides run `scripts/train/dit.py`
in inference mode: as it is, compiled by `torch.compile` for each batch size, and in bfloat16. onnxruntime runs the same
network in float32, exported by PyTorch. Run it on a machine that does nothing else.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch

import harness

sys.path.insert(0, os.path.join(harness.ROOT, "scripts", "train"))
import dit  # noqa: E402

SIDES = ["torch", "compile", "bf16", "onnx"]
TEXTS = {"torch": "PyTorch f32", "compile": "torch.compile f32", "bf16": "PyTorch bf16", "onnx": "onnxruntime f32"}
OURS = "image-generator"


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", default=os.path.join(harness.ROOT, "target", "release", "examples", "generator"))
    p.add_argument("--weights", default=os.path.join(harness.ROOT, "src", "model", "mnist.safetensors"))
    p.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    p.add_argument("--steps", type=int, help="of the batches (default: the weights' own)")
    p.add_argument("--guidance", type=float, help="default: the weights' own")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--seconds", type=float, default=0.5, help="how long a side draws at most before the next case")
    p.add_argument("--json", help="where every single figure goes")
    return p.parse_args()


class Ours:
    def __init__(self, a):
        self.child = subprocess.Popen([a.binary, str(a.threads), a.weights], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def draw(self, batch: int, sampler: dit.Sampler) -> float:
        self.child.stdin.write(f"{batch} {sampler.steps} {sampler.guidance}\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit("the generator ended")
        return float(line)


class Python:
    """A network that `dit.sample` can call as if it was a dit.DiT."""

    def __init__(self, network, config: dit.Config):
        self.network, self.config, self.seed = network, config, 0

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(*inputs)

    def draw(self, batch: int, sampler: dit.Sampler) -> float:
        c = self.config
        self.seed += 1
        started = time.perf_counter()
        noise = torch.randn(batch, c.channels, c.image_size, c.image_size, generator=torch.Generator().manual_seed(self.seed))
        pixels = dit.to_bytes(dit.sample(self, noise, torch.arange(batch) % c.classes, sampler)).numpy()
        took = time.perf_counter() - started
        assert pixels.any()
        return took


def bf16(weights: str):
    model = dit.load(weights)[0].bfloat16()
    exact = model.frequencies
    # Angles of a thousand have no meaning in bfloat16: computed as ever, then narrowed.
    model.frequencies = lambda t: exact(t).bfloat16()
    return lambda x, t, label: model(x.bfloat16(), t, label).float()


def onnx(weights: str, config: dit.Config, threads: int):
    import onnxruntime

    model = dit.load(weights)[0]
    x, t, label = torch.zeros(2, config.channels, config.image_size, config.image_size), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = os.path.join(folder, "model.onnx")
        batch = torch.export.Dim("batch", min=1, max=1024)
        torch.onnx.export(model, (x, t, label), path, dynamo=True, verbose=False, dynamic_shapes={"x": {0: batch}, "t": {0: batch}, "label": {0: batch}}, input_names=["x", "t", "label"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(session.run(None, {n: v.numpy() for n, v in zip(names, inputs)})[0])


def build(side: str, a, config: dit.Config):
    if side == "bf16":
        return Python(bf16(a.weights), config)
    if side == "onnx":
        return Python(onnx(a.weights, config, a.threads), config)
    model = dit.load(a.weights)[0]
    return Python(torch.compile(model, dynamic=False) if side == "compile" else model, config)


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    torch.set_num_interop_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, sampler = dit.load(a.weights)
    config = model.config
    sampler = dit.Sampler(a.steps or sampler.steps, sampler.guidance if a.guidance is None else a.guidance, sampler.shift)
    about = harness.machine()
    sides = {OURS: Ours(a)} | {TEXTS[side]: build(side, a, config) for side in a.sides}
    one = dit.Sampler(1, sampler.guidance, sampler.shift)
    cases = {f"digits/s, {b} at a time, {sampler.steps} steps": (b, sampler) for b in a.batches}
    cases |= {"one digit, 1 step, ms": (1, one), f"one digit, {sampler.steps} steps, ms": (1, sampler)}

    for name, side in sides.items():
        for batch, s in cases.values():
            # Compiles, allocates, warms: whatever a first call does.
            for _ in range(3):
                side.draw(batch, s)
        print(f"{name} is warm", file=sys.stderr, flush=True)
    figures = {name: {case: [] for case in cases} for name in sides}
    try:
        rounds(a, sides, cases, figures)
    except KeyboardInterrupt:
        # Ctrl-C: the table of what there is.
        pass
    show(a, about, sides, cases, figures, sampler.guidance)


def rounds(a, sides: dict, cases: dict, figures: dict):
    for i in range(a.rounds):
        for case, (batch, s) in cases.items():
            for name in list(sides)[:: -1 if i % 2 else 1]:
                times, until = [], time.perf_counter() + a.seconds
                while len(times) < 3 or (time.perf_counter() < until and len(times) < 30):
                    times.append(sides[name].draw(batch, s))
                took = statistics.median(times)
                figures[name][case].append(took * 1e3 if case.endswith("ms") else batch / took)
        print(f"round {i + 1}/{a.rounds}", file=sys.stderr, flush=True)


def show(a, about: str, sides: dict, cases: dict, figures: dict, guidance: float):
    print(f"{about}; {a.threads} threads a side, {a.rounds} rounds, guidance {guidance:g}; median (lowest to highest) of the rounds' medians\n")
    rows = []
    for case in cases:
        middle = {name: statistics.median(figures[name][case]) for name in sides}
        line = [case]
        for name in sides:
            # Above 1: image-generator does better.
            better = middle[name] / middle[OURS] if case.endswith("ms") else middle[OURS] / middle[name]
            line.append(harness.summary(figures[name][case]) + ("" if name == OURS else f", {better:.2f} x"))
        rows.append(line)
    print(harness.table([""] + list(sides), rows))
    print(f"\nx: how many times {OURS} is as fast")
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"machine": about, "threads": a.threads, "figures": figures}, f, indent=1)


if __name__ == "__main__":
    main()
