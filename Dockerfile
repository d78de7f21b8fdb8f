# The image of every node, head and worker: `docker build -t REGISTRY/linearsr:0.1.0-ray2.60.0 .`
#
# Nothing is installed when it runs: the package, its dependencies at the versions of constraints.txt and
# the weights of linearsr-tiny are in it. torch brings its own CUDA; of the host it wants a driver.
#
# Written without Docker at hand: a linter has read this file, nobody has built it. The last RUN fails the
# build where what was installed does not work together.
FROM rayproject/ray:2.60.0-py311-gpu

# OpenCV's, and a compiler for Triton's launchers. Their versions are those of the base image's Ubuntu.
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# `ray`, as in the base image: Kubernetes wants the number to see that it is not root.
USER 1000
WORKDIR /home/ray/linearsr
COPY --chown=1000:100 . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[all]"
RUN ray --version \
    && linearsr models \
    && python -c "import cv2, deepspeed, diffusers, torch, linearsr.cluster.train, linearsr.cluster.serve"
