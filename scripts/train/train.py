"""Trains the digits model by flow matching on the MNIST training files.

    python scripts/train/train.py --data DIR --out scripts/train/out --epochs 30

x_t = t x + (1 - t) noise; the network predicts x, the loss is the squared error of the velocity
(x - x_t) / (1 - t) (Lipman et al. 2023; Li & He 2025). A share of the labels is dropped, so that one network
serves classifier-free guidance. What is exported is an exponential moving average of the weights. It draws well in
many steps; distill.py goes on from it to few.
A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

import argparse
import json
import math
import os
import time

import torch
from safetensors.torch import save_file

import data
from dit import Config, DiT, Sampler, metadata


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder with the four MNIST files")
    p.add_argument("--out", required=True, help="folder for checkpoint.pt, log.jsonl and model.safetensors")
    p.add_argument("--epochs", type=int, default=30)
    p.add_argument("--batch", type=int, default=192)
    p.add_argument("--rate", type=float, default=1e-3)
    p.add_argument("--ema", type=float, default=0.9995)
    p.add_argument("--label-dropout", type=float, default=0.1)
    p.add_argument("--seed", type=int, default=2026)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--checkpoint-seconds", type=float, default=300)
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--name", default="mnist")
    return p.parse_args()


def draw_times(n: int, generator) -> torch.Tensor:
    """Three quarters logit-normal (most of the work is in the middle), one quarter uniform (the ends count too)."""
    normal = torch.sigmoid(torch.randn(n, generator=generator) - 0.6)
    uniform = torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.25, uniform, normal)


def export(path: str, tensors: dict, config: Config, sampler: Sampler, name: str):
    tensors = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in tensors.items()}
    save_file(tensors, path, metadata(config, sampler, name, [str(i) for i in range(config.classes)]))


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    os.makedirs(a.out, exist_ok=True)
    images, labels = data.load(a.data, "train")
    images, labels = data.to_unit(images).to(a.device), labels.to(a.device)
    config, sampler = Config(), Sampler()
    model = DiT(config).to(a.device)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.rate, betas=(0.9, 0.99), weight_decay=0.0)
    steps_an_epoch = len(images) // a.batch
    steps = steps_an_epoch * a.epochs
    warmup = min(500, steps // 10 + 1)
    step, seconds = 0, 0.0
    checkpoint = os.path.join(a.out, "checkpoint.pt")
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint, map_location=a.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step, seconds = saved["ema"], saved["step"], saved["seconds"]
        print(f"resumed at step {step} of {steps}", flush=True)
    forward = torch.compile(model) if a.compile else model

    def save():
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step, "seconds": seconds}
        torch.save(saved, checkpoint + ".tmp")
        os.replace(checkpoint + ".tmp", checkpoint)
        export(os.path.join(a.out, "model.safetensors"), ema, config, sampler, a.name)

    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps:,} steps of {a.batch}, seed {a.seed}", flush=True)
    log = open(os.path.join(a.out, "log.jsonl"), "a")
    started = saved_at = time.monotonic()
    base_seconds, base_step, loss_sum, loss_n = seconds, step, 0.0, 0
    while step < steps:
        epoch, at = divmod(step, steps_an_epoch)
        if at == 0 or step == base_step:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(a.seed * 1000 + epoch))
        generator = torch.Generator().manual_seed(a.seed * 10_000_000 + step)
        pick = order[at * a.batch : (at + 1) * a.batch].to(a.device)
        x, y = images[pick], labels[pick]
        t = draw_times(a.batch, generator).to(a.device)
        y = torch.where(torch.rand(a.batch, generator=generator).to(a.device) < a.label_dropout, config.classes, y)
        noise = torch.randn(x.shape, generator=generator).to(a.device)
        tt = t.view(-1, 1, 1, 1)
        x_t = tt * x + (1 - tt) * noise
        rate = a.rate * min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(a.device.split(":")[0], torch.bfloat16):
            predicted = forward(x_t, t, y)
        loss = ((predicted.float() - x) / (1 - tt).clamp_min(0.05)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(a.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        loss_sum, loss_n = loss_sum + loss.item(), loss_n + 1
        seconds = base_seconds + time.monotonic() - started
        if step % 50 == 0 or step == steps:
            speed = (step - base_step) / (time.monotonic() - started)
            left = (steps - step) / speed
            entry = {"step": step, "epoch": round(step / steps_an_epoch, 2), "loss": round(loss_sum / loss_n, 5), "rate": round(rate, 6), "images_a_second": round(speed * a.batch), "seconds": round(seconds)}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            print(f"step {step}/{steps}  epoch {entry['epoch']}  loss {entry['loss']:.4f}  {entry['images_a_second']} images/s  {left / 60:.1f} min left", flush=True)
            loss_sum, loss_n = 0.0, 0
        if time.monotonic() - saved_at > a.checkpoint_seconds:
            save()
            saved_at = time.monotonic()
    save()


if __name__ == "__main__":
    main()
