# One image for CPU and GPU: torch's wheels bring CUDA, cuDNN and NCCL with them, the host only gives the driver. A CUDA base
# would hold them twice. `make image` builds it with buildah or docker; docs/clusters.md has its size and how to run it.
# Written without heredocs, which buildah before 1.33 does not know.

# Any Debian or Ubuntu with python3.11 to 3.13, venv and the headers (python3-dev) will do
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE_IMAGE} AS requirements
# For a network with its own certificate authority or package index
ARG PIP_CERT
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
COPY requirements.txt pyproject.toml /tmp/
# The lock holds the development tools too, so here it constrains: uv checks each file against its hash all the same.
# All are wheels but DeepSpeed, a Python source. Its kernels are not compiled: personmae uses none of them.
RUN --mount=type=cache,target=/root/.cache \
    python3 -m venv /opt/uv && \
    python3 -m venv /opt/venv && \
    sed -n '/^uv==/,/[^\\]$/p' /tmp/requirements.txt > /tmp/uv.txt && \
    /opt/uv/bin/pip install --require-hashes --only-binary :all: -r /tmp/uv.txt && \
    if [ -n "${PIP_CERT}" ]; then export SSL_CERT_FILE="${PIP_CERT}"; fi && \
    DS_BUILD_OPS=0 /opt/uv/bin/uv pip install --python /opt/venv/bin/python \
        ${PIP_INDEX_URL:+--default-index ${PIP_INDEX_URL}} --only-binary :all: --no-binary deepspeed \
        --constraint /tmp/requirements.txt --build-constraint /tmp/requirements.txt -r /tmp/pyproject.toml

FROM ${BASE_IMAGE}
# The compiler is here because train.compile, on by default, cannot do without: Triton builds its driver module with a C compiler
# on the GPU node, and Inductor's code for CPUs is C++ (docs/clusters.md). `--build-arg COMPILER=` leaves it out, for
# fine-tuning and for train.compile=false. PACKAGES are further ones, such as "libibverbs1 ibverbs-providers" for InfiniBand.
ARG COMPILER=g++
ARG PACKAGES=
# DL3008: Debian removes a version from its archive when the next one comes, so a pinned one soon cannot be built; the base is
# pinned by its digest.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends tini ${COMPILER} ${PACKAGES} && \
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old && \
    groupadd --gid 10001 personmae && \
    useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin personmae
COPY --from=requirements /opt/venv /opt/venv
# The root may be read-only: whatever libraries write goes to /tmp unless the pod says otherwise. Which GPUs are seen is the
# runtime's to say, hence no NVIDIA_VISIBLE_DEVICES: a CPU pod of a GPU node would get them all.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TORCH_EXTENSIONS_DIR=/tmp/cache/extensions \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . /opt/personmae
WORKDIR /opt/personmae
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable . && \
    python -m compileall -q personmae launcher && \
    chmod -R u=rwX,go=rX .

ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="personmae" \
      org.opencontainers.image.description="PersonMAE pre-training for person re-identification" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
USER 10001:10001
STOPSIGNAL SIGTERM
# Without -g: a signal is for the agent alone, which passes it on; data loading processes must outlive the ranks' last step
ENTRYPOINT ["/usr/bin/tini", "--", "personmae"]
CMD ["--help"]
