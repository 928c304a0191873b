# The service on distroless: no shell, no package manager, not root.
#
#   docker build -t image-generator .
#   docker build -t image-generator:cuda --build-arg ACCELERATOR=cuda .
#
# Where the weights are is chosen by --target, or when the container starts:
#   baked     in the image:     --target baked --build-arg MODEL_URI=hf://owner/repo
#   download  in object storage, fetched by the first request: --target download --build-arg MODEL_URI=gs://bucket/key
#   (none)    in a volume:      docker run -v "$(pwd)/models:/app/models" ...; an empty folder means the built-in weights

ARG ACCELERATOR=cpu
# 12.2 is what the driver of Cloud Run's L4 runs; later drivers run it too.
ARG CUDA=12.2.2

FROM rust:1.95-slim-bookworm AS toolchain-cpu
ENV FEATURES=""

FROM nvidia/cuda:${CUDA}-devel-ubuntu22.04 AS toolchain-cuda
COPY --from=toolchain-cpu /usr/local/cargo /usr/local/cargo
COPY --from=toolchain-cpu /usr/local/rustup /usr/local/rustup
ENV CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup PATH=/usr/local/cargo/bin:/usr/local/cuda/bin:/usr/bin:/bin
ENV FEATURES="cuda"

# The default once more: Podman finds the stage before it has read the ARG above.
# hadolint ignore=DL3006
FROM toolchain-${ACCELERATOR:-cpu} AS builder
# No GPU is seen while an image is built, so nvcc cannot ask it: 89 is an L4, 90 an H100 or H200.
ARG CUDA_COMPUTE_CAP=89
WORKDIR /build
# Dependencies first, with nothing of ours in the crate: this layer stays until Cargo.lock changes.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src && echo 'fn main() {}' >src/main.rs && touch src/lib.rs \
    && cargo build --release --locked --bin image-generator --features "$FEATURES"
COPY src src
# Files come with the date of the checkout, which is older than what was just built; cargo would see nothing to do.
RUN touch src/main.rs src/lib.rs \
    && cargo build --release --locked --bin image-generator --features "$FEATURES" \
    && mkdir -p /models

# glibc, certificates and time zones; what else the binary needs is one small library, see below.
FROM gcr.io/distroless/base-nossl-debian12:nonroot AS base-cpu

FROM gcr.io/distroless/cc-debian12:nonroot AS base-cuda
COPY --from=toolchain-cuda /usr/local/cuda/lib64/libcublas.so.12 /usr/local/cuda/lib64/libcublasLt.so.12 \
    /usr/local/cuda/lib64/libcudart.so.12 /usr/local/cuda/lib64/libcurand.so.10 \
    /usr/local/cuda/lib64/libnvrtc.so.12 /usr/local/cuda/lib64/libnvrtc-builtins.so.12.2 /usr/local/cuda/lib64/
# The driver's own libraries come from outside: Cloud Run mounts them in the first folder.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/local/cuda/lib64 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility DEVICE=cuda

# hadolint ignore=DL3006
FROM base-${ACCELERATOR:-cpu} AS service
# Unwinding after a panic.
COPY --from=builder /usr/lib/*-linux-gnu/libgcc_s.so.1 /usr/lib/
COPY --from=builder /build/target/release/image-generator /usr/local/bin/image-generator
COPY --from=builder --chown=65532:65532 /models /app/models
WORKDIR /app
USER 65532:65532
ENV HOST=0.0.0.0 PORT=5000 MODEL_PATH=/app/models
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=2s --retries=3 CMD ["/usr/local/bin/image-generator", "health"]
ENTRYPOINT ["/usr/local/bin/image-generator"]

FROM service AS download
ARG MODEL_URI=""
ARG MODEL_SHA256=""
ENV MODEL_URI=${MODEL_URI} MODEL_SHA256=${MODEL_SHA256}

# Fetched and verified by the service itself. Credentials, if there must be some, are NAME=VALUE lines in a file that no
# layer keeps: --secret id=environment,src=FILE
FROM builder AS weights
ARG MODEL_URI=""
ARG MODEL_SHA256=""
RUN --mount=type=secret,id=environment,target=/run/secrets/environment \
    if [ -f /run/secrets/environment ]; then set -a && . /run/secrets/environment && set +a; fi \
    && if [ -n "$MODEL_URI" ]; then target/release/image-generator fetch "$MODEL_URI" --output /models/model.safetensors; fi

FROM service AS baked
COPY --from=weights /models /app/models

# The default is what stands last.
FROM service
