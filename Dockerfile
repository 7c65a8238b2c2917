# An image for machines with GPUs: all of requirements/gpu.lock, the diffs of patches/, and this package. Never built
# (docs/install.md). From the checkout's root, then for pyxis a file that needs no registry:
#
#     docker build --tag megatron-bai .
#     enroot import --output megatron-bai.sqsh dockerd://megatron-bai
#
# CUDA 13's toolkit, cuDNN and a compiler, with Python 3.12: what Transformer Engine is compiled with (docs/gpu.md).
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE}
# The lists of files below need bash; sh would take them for names.
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git patch python3.12-dev python3.12-venv && \
    rm -rf /var/lib/apt/lists/*
# MEGATRON_BAI_VENV is where launch/ looks, whatever PATH a job brings from outside.
ENV VIRTUAL_ENV=/opt/venv MEGATRON_BAI_VENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron_bai

# The commands of docs/gpu.md and of patches/README.md, in one layer: no compiled file of an unpatched text is left.
COPY requirements/gpu.lock requirements/
COPY patches patches/
RUN python3.12 -m venv "$VIRTUAL_ENV" && \
    grep -v transformer-engine-torch requirements/gpu.lock > /tmp/rest.lock && \
    pip install --no-deps -r /tmp/rest.lock && \
    pip install --no-deps --no-build-isolation $(grep transformer-engine-torch requirements/gpu.lock) && \
    patches=$PWD/patches && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
    for diff in "$patches"/{megatron-core-0.16.1,sglang-0.5.21}/*.patch; do \
        patch -p1 --fuzz=0 --forward < "$diff" || exit 1; \
    done

COPY pyproject.toml setup.py README.md LICENSE ./
COPY conf conf/
COPY launch launch/
COPY megatron_bai megatron_bai/
RUN pip install --no-deps . && megatron-bai --help > /dev/null
