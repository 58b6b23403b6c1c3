# Images for training and for the gateway, on CPUs or NVIDIA GPUs; see docs/docker.md.
#   docker build --target train -t everalign .
#   docker build --target gateway -t everalign-gateway .
#   docker build --target train -t everalign:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.11-slim AS base
# Where torch comes from: PyTorch's index for CPUs, or for a version of CUDA, whose libraries come with it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/data/huggingface
RUN useradd --create-home --uid 1000 everalign && mkdir /data && chown everalign /data
WORKDIR /src
# torch alone first: it is large, and changes less often than the rest.
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY src src

FROM base AS train
RUN pip install --constraint constraints.txt ".[all]"
USER everalign
WORKDIR /data
VOLUME /data
ENTRYPOINT ["everalign"]
CMD ["--help"]

# A server to try the gateway with.
FROM train AS upstream
USER root
RUN pip install --constraint /src/constraints.txt "transformers[serving]"
USER everalign
EXPOSE 8000
ENTRYPOINT ["transformers", "serve", "--host", "0.0.0.0", "--port", "8000", "--device", "cpu"]

FROM base AS gateway
RUN pip install --constraint constraints.txt ".[serve,postgres]"
USER everalign
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health')"]
ENTRYPOINT ["everalign", "serve", "--host", "0.0.0.0"]
