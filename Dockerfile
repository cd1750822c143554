# The course in a container: the package, the notebooks, JupyterLab.
#
#   docker build -t nanovllm-taught .                         for a CPU (2 GB)
#   docker build -t nanovllm-taught --build-arg DEVICE=cuda . for NVIDIA GPUs (about 7 GB)
#   docker run --rm nanovllm-taught python example.py
#   docker run --rm -p 8888:8888 nanovllm-taught              JupyterLab; with a GPU add --gpus all
#
# CUDA's libraries come with PyTorch's wheel, so both are built on the same image. A GPU needs
# NVIDIA's container toolkit on the host; two processes of one model need --ipc=host.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# gcc compiles the C kernels (nanovllm/cpu), and Triton's launchers
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 reader

WORKDIR /srv/nano-vllm-taught
COPY --chown=reader:reader . .
RUN case "$DEVICE" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "DEVICE must be cpu or cuda, not $DEVICE" >&2; exit 1 ;; \
    esac \
    && pip install -e ".[dev]"

USER 1000
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "nbs"]
