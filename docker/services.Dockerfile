# Prefect's and MLflow's servers, each started by its command in compose.yaml. No torch in here.
#   docker build -f docker/services.Dockerfile -t edgepress-services .
ARG PYTHON=3.11.13-slim-bookworm
FROM python:${PYTHON}
RUN useradd --create-home --uid 10001 edgepress
COPY constraints.txt docker/services.txt docker/make_bucket.py /opt/edgepress/
RUN pip install --no-cache-dir -c /opt/edgepress/constraints.txt -r /opt/edgepress/services.txt
ENV PREFECT_SERVER_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true
USER 10001
WORKDIR /home/edgepress
# compose.yaml says which server runs, and how to ask it whether it is well.
HEALTHCHECK NONE
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]
