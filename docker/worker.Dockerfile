# A Prefect process worker with edgepress in it, for the CPU by default:
#   docker build -f docker/worker.Dockerfile -t edgepress-worker .
# For CUDA (torch of PyPI brings CUDA's libraries; the host needs the driver and NVIDIA's container toolkit):
#   docker build -f docker/worker.Dockerfile -t edgepress-worker:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
ARG PYTHON=3.11.13-slim-bookworm

FROM python:${PYTHON} AS build
# Debian keeps only the newest build of a version, so a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ cmake make \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=export,harness,s3,dask
WORKDIR /src
COPY . .
RUN docker/install.sh /opt/edgepress

FROM python:${PYTHON} AS worker
# llama.cpp and torch compute with OpenMP.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 edgepress \
    && install --directory --owner=edgepress /work /locks
COPY --from=build /opt/edgepress /opt/edgepress
ENV PATH=/opt/edgepress/bin:$PATH \
    PYTHONSAFEPATH=1 \
    HF_HOME=/work/.cache/huggingface \
    EDGEPRESS_LOCKS=/locks \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true
USER 10001
WORKDIR /work
# The store, the outputs and the recipes: one volume for all workers that share a sweep.
VOLUME /work
# By which the containers of a host take turns at its GPUs, and at timing alone.
VOLUME /locks
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
CMD ["prefect", "worker", "start", "--pool", "edgepress", "--type", "process", "--install-policy", "never", "--with-healthcheck"]
