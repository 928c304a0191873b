"""The Flask + PyTorch service of the same model: what the benchmarks compare with.

    MODEL_PATH=src/model/mnist.safetensors PORT=5002 python tests/bench/flask_service.py

MODEL_URI=s3://bucket/key in place of MODEL_PATH downloads the weights to a temporary file first, by boto3.

It is written as such services are: PyTorch is imported at the top, the model is built at the first request that
needs it, threads are PyTorch's and Flask's defaults. No batching: each request draws its own digits.

    GET  /health/live
    GET  /v1/digits/{label}?seed=
    POST /v1/generate {"digits": "0123456789", "count": 10, "seed": 1}: rows of digits, one batch
"""

import io
import logging
import os
import sys
import tempfile
import threading

import torch
from flask import Flask, Response, abort, jsonify, request
from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts", "train"))
import dit  # noqa: E402

app = Flask(__name__)
lock = threading.Lock()
loaded = None


def model() -> tuple[dit.DiT, dit.Sampler]:
    global loaded
    with lock:
        if loaded is None:
            loaded = load()
    return loaded


def load() -> tuple[dit.DiT, dit.Sampler]:
    uri = os.environ.get("MODEL_URI")
    if uri is None:
        return dit.load(os.environ["MODEL_PATH"])
    import boto3

    bucket, key = uri.removeprefix("s3://").split("/", 1)
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        boto3.client("s3").download_file(bucket, key, f.name)
        return dit.load(f.name)


def draw(labels: list[int], seed: int | None) -> torch.Tensor:
    """[N, H, W] bytes."""
    network, sampler = model()
    c = network.config
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    noise = torch.randn(len(labels), c.channels, c.image_size, c.image_size, generator=generator)
    return dit.to_bytes(dit.sample(network, noise, torch.tensor(labels), sampler)).squeeze(1)


def png(pixels: torch.Tensor) -> Response:
    out = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(out, "PNG")
    return Response(out.getvalue(), mimetype="image/png")


@app.get("/health/live")
def live():
    return jsonify(status="ok")


@app.get("/v1/digits/<int:label>")
def one(label: int):
    if label > 9:
        abort(404)
    return png(draw([label], request.args.get("seed", type=int))[0])


@app.post("/v1/generate")
def many():
    body = request.get_json()
    digits, count = body.get("digits", "0123456789"), body.get("count", 1)
    cells = draw([int(d) for d in digits] * count, body.get("seed"))
    size = cells.shape[-1]
    return png(cells.view(count, len(digits), size, size).transpose(1, 2).reshape(count * size, -1))


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    # HTTP/1.1, so that clients may keep their connection: Werkzeug's default is a connection a request.
    from werkzeug.serving import WSGIRequestHandler

    WSGIRequestHandler.protocol_version = "HTTP/1.1"
    app.run("127.0.0.1", int(os.environ.get("PORT", "5000")), threaded=True)
