# CPU by default. For a GPU, name a Debian-like base image with Python >= 3.11, venv and the CUDA runtime:
#   docker build --build-arg BASE_IMAGE=... -t d2o-serve .
# PIP_EXTRA_INDEX_URL may name an index of CPU-only torch wheels: the image is then several GB smaller.
ARG BASE_IMAGE=python:3.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /opt/d2o
ENV PATH=/opt/d2o/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
# The lock constrains: only what the two distributions need at run time is installed, at its locked version.
RUN pip install --constraint requirements.lock . ./client

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 d2o \
    && useradd --uid 10001 --gid d2o --create-home --home-dir /home/d2o d2o \
    && install --directory --owner d2o --group d2o /home/d2o/.cache
COPY --from=build /opt/d2o /opt/d2o
ENV PATH=/opt/d2o/bin:${PATH} PYTHONUNBUFFERED=1 HOME=/home/d2o
USER 10001:10001
WORKDIR /home/d2o
# Models that were fetched and converted: mount a volume here to keep them.
VOLUME /home/d2o/.cache
EXPOSE 50051
# Asks the standard gRPC health service; the first start fetches and converts a model, hence the long start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import grpc; from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; reply = rpc.HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check(pb.HealthCheckRequest(), timeout=4); raise SystemExit(reply.status != pb.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["d2o-serve"]
CMD ["--host", "0.0.0.0", "--port", "50051"]
