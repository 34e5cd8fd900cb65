# The judge's side in a container: keys, claims and verdicts on weights, without PyTorch, without
# network, as a user who may write nowhere but into /out.
#
#   docker build -t nnpassport .
#   docker run --rm --network none --read-only --tmpfs /tmp --memory 8g \
#       -v "$PWD/evidence:/evidence:ro" nnpassport verify /evidence/suspect --key /evidence/a.key
#
# The tests check this file's form; they do not build the image.
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m venv /opt/nnpassport && /opt/nnpassport/bin/pip install --no-cache-dir .

FROM python:3.13-slim
COPY --from=build /opt/nnpassport /opt/nnpassport
RUN useradd --system --uid 1000 judge && mkdir /out && chown judge /out
ENV PATH=/opt/nnpassport/bin:$PATH PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp
USER judge
WORKDIR /out
ENTRYPOINT ["nnpassport"]
