# Two images, which differ only in their build of torch and fbgemm:
#   docker build --target cuda -t mlet-dist:0.1.0 .
#   docker build --target cpu  -t mlet-dist-cpu:0.1.0 .
# --build-arg PIP_EXTRA_INDEX_URL=… names an index with the CPU builds of torch; without it, the cpu image contains the default
# build of torch, which works, too, but is several GB larger. --build-arg EXTRA_PACKAGES=s3fs adds packages, here for S3.
# The target cpu has been built with buildah, on Debian 12 with its Python 3.11; cuda has not. Tests only lint this file.

ARG PYTHON=3.11.11-slim-bookworm

FROM python:${PYTHON} AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mlet_dist mlet_dist
COPY launch launch
COPY configs configs

FROM source AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mlet/venv
ENV PATH=/opt/mlet/venv/bin:$PATH
ARG EXTRA_PACKAGES=""

FROM base AS build-cuda
RUN pip install -c constraints.txt torch==2.13.0 \
    && pip install -c constraints.txt '.[cuda,metrics]' ${EXTRA_PACKAGES}

FROM base AS build-cpu
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install -c constraints.txt torch==2.13.0 \
    && pip install -c constraints.txt '.[cpu,metrics]' ${EXTRA_PACKAGES} \
    && pip install -c constraints.txt --no-deps torchrec==1.8.0

FROM python:${PYTHON} AS runtime
RUN useradd --uid 1000 --create-home mlet
ENV PATH=/opt/mlet/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=source /src/configs /opt/mlet/configs
WORKDIR /opt/mlet

FROM runtime AS cpu
COPY --from=build-cpu /opt/mlet/venv /opt/mlet/venv
USER 1000:1000
CMD ["mlet", "doctor"]

# `docker build .` builds the last stage. The libraries of CUDA come with torch, the driver is that of the node.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/mlet/venv /opt/mlet/venv
USER 1000:1000
CMD ["mlet", "doctor"]
