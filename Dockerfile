# Two images from one file; only the stages of the chosen one are built:
#   docker build --build-arg VARIANT=cpu --tag d2o-serve:0.1.0-cpu .
#   docker build --build-arg VARIANT=gpu --tag d2o-serve:0.1.0-gpu .
# For cpu, PIP_EXTRA_INDEX_URL may name an index of CPU-only torch wheels: the image is then several GB smaller.
ARG VARIANT=cpu

FROM python:3.13-slim-bookworm AS cpu-base

# CUDA's runtime for drivers of version 580 and newer. cuBLAS, cuDNN and NCCL come with torch, hence "base".
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS gpu-base
# Triton compiles a launcher of each kernel against Python's headers, so a C compiler stays in the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The interpreter that a virtual environment was made with is the one that runs it: both stages start alike.
FROM ${VARIANT}-base AS build
WORKDIR /src
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /opt/d2o
ENV PATH=/opt/d2o/bin:${PATH} PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
# The lock constrains: only what the two distributions need at run time is installed, at its locked version.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock . ./client

FROM ${VARIANT}-base
RUN groupadd --gid 10001 d2o \
    && useradd --uid 10001 --gid d2o --create-home --home-dir /home/d2o d2o \
    && install --directory --owner d2o --group d2o /home/d2o/.cache
COPY --from=build /opt/d2o /opt/d2o
# Flags win over variables, so these two are no more than this image's defaults.
ENV PATH=/opt/d2o/bin:${PATH} PYTHONUNBUFFERED=1 HOME=/home/d2o D2O_SERVE_HOST=0.0.0.0 D2O_SERVE_PORT=50051
USER 10001:10001
WORKDIR /home/d2o
# Models that were fetched and converted, and compiled code: mount a volume here to keep them. All else but /tmp may be
# read-only.
VOLUME /home/d2o/.cache
EXPOSE 50051 9400
# The first start fetches and converts a model, hence the long start period. Settings in variables are seen, flags are not.
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s --retries=3 \
    CMD ["python3", "-m", "d2o_server.healthcheck"]
ENTRYPOINT ["d2o-serve"]
