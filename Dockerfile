# New-LLM on a CPU.
#   docker build --tag new-llm .
#   docker run --rm --volume "$PWD:/data" new-llm experiment --config /app/configs/quick.yaml
FROM python:3.11-slim

# The compiler makes the CPU kernels at first use; without one PyTorch's own forms run. Only libc's headers are needed.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY configs configs
# torch's CPU builds: the usual ones bring gigabytes of CUDA.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt .

# Runs, and the cache of tokens and kernels, are kept where /data is a volume.
ENV NEW_LLM_CACHE=/data/.cache
RUN useradd --create-home researcher && mkdir /data && chown researcher /data
USER researcher
WORKDIR /data
ENTRYPOINT ["new-llm"]
CMD ["--help"]
