"""Brings a weights file from an S3 store into tensors, the way that the name says: what `cold.py` compares with.

    AWS_ENDPOINT_URL=http://localhost:9000 python tests/bench/fetch_python.py boto3 s3://bucket/model.safetensors

boto3   download_file to a disk, then safetensors.torch.load_file
crt     the same download by AWS's Common Runtime (awscrt), which is what the AWS CLI uses
runai   Run:ai Model Streamer: ranges straight into CPU tensors

Each imports only what it needs. One byte of each page of each tensor is read at the end, because load_file maps the
file and reads nothing itself; nobody checks a digest. Prints one line of JSON when the tensors are there, and stays
until its input ends, so that its memory can be looked at.
"""

import json
import os
import sys
import tempfile
import time


def boto3(bucket: str, key: str):
    import boto3 as sdk
    import torch  # noqa: F401
    from safetensors.torch import load_file

    imported = time.perf_counter()
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        sdk.client("s3").download_file(bucket, key, f.name)
        return imported, load_file(f.name)


def crt(bucket: str, key: str):
    from urllib.parse import urlsplit

    import torch  # noqa: F401
    from awscrt import auth, http, io, s3
    from safetensors.torch import load_file

    imported = time.perf_counter()
    group = io.EventLoopGroup()
    bootstrap = io.ClientBootstrap(group, io.DefaultHostResolver(group))
    credentials = auth.AwsCredentialsProvider.new_static(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    client = s3.S3Client(
        bootstrap=bootstrap,
        region=os.environ["AWS_REGION"],
        tls_mode=s3.S3RequestTlsMode.DISABLED if endpoint.scheme == "http" else s3.S3RequestTlsMode.ENABLED,
        signing_config=s3.create_default_s3_signing_config(region=os.environ["AWS_REGION"], credential_provider=credentials),
    )
    request = http.HttpRequest("GET", f"/{bucket}/{key}", http.HttpHeaders([("host", endpoint.netloc)]))
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        made = client.make_request(type=s3.S3RequestType.GET_OBJECT, request=request, recv_filepath=f.name)
        made.finished_future.result()
        return imported, load_file(f.name)


def runai(bucket: str, key: str):
    from runai_model_streamer import SafetensorsStreamer

    imported = time.perf_counter()
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(f"s3://{bucket}/{key}")
        # Owned by whoever gets them, so not copied.
        return imported, dict(streamer.get_tensors())


def main():
    way, uri = sys.argv[1:]
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    imported, tensors = {"boto3": boto3, "crt": crt, "runai": runai}[way](bucket, key)

    import torch

    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[::4096].max()
    load_ms = (time.perf_counter() - imported) * 1e3
    bytes_in_all = sum(t.numel() * t.element_size() for t in tensors.values())
    print(json.dumps({"message": "weights resident", "bytes": bytes_in_all, "load_ms": load_ms}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
