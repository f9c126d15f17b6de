# The command line with ONNX Runtime and OpenVINO on CPU. Build from the repository root: see docker/README.md.
ARG BASE=python:3.11-slim
# hadolint ignore=DL3006
FROM ${BASE}

# Extra arguments of pip, such as an index that serves CPU builds of torch.
ARG PIP_ARGS=""

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY optin_deploy ./optin_deploy
COPY exporters ./exporters
# torch first and by exact pin, so that the second step cannot swap the build. PIP_ARGS is split into words on purpose.
# hadolint ignore=SC2086
RUN python3 -m pip install --no-cache-dir ${PIP_ARGS} torch==2.13.0 -c constraints.txt \
 && python3 -m pip install --no-cache-dir ${PIP_ARGS} '.[cpu]' -c constraints.txt \
 && python3 -m pip check

RUN useradd --create-home --uid 1000 optin
USER 1000
WORKDIR /home/optin
ENTRYPOINT ["optin"]
CMD ["--help"]
