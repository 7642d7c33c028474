# docker build -t musetalk . && docker run --gpus all -v "$PWD/models:/home/trainer/musetalk/models" -it musetalk
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer/musetalk
ENV PATH=/home/trainer/musetalk/.venv/bin:$PATH
COPY --chown=trainer requirements.txt .
RUN python3 -m venv .venv && pip install --no-cache-dir --requirement requirements.txt
COPY --chown=trainer . .
CMD ["python", "-m", "musetalk.check"]
