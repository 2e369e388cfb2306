# The project with the exact versions of requirements.lock, on CUDA (DeepSpeed builds its ops with nvcc when they are first used).
#   docker build -t dpo .
#   docker run --gpus all --shm-size 16g -v "$PWD:/work" dpo launch/run train --config mine.yaml
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/dpo
COPY requirements.hashes requirements.lock ./
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements.hashes \
    && .venv/bin/pip install --no-cache-dir -r requirements.lock
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --editable . && touch .venv/.ready
ENV PATH=/opt/dpo/.venv/bin:$PATH PYTHON=/opt/dpo/.venv/bin/python
# Commands run in the folder that is mounted; the first run copies configs/ and launch/ into it.
WORKDIR /work
ENTRYPOINT ["/opt/dpo/launch/in_container"]
CMD ["dpo", "--help"]
