# The environment that runs train in: one Python with torch, xFormers and all else that docker/*.lock pins, and pathfm.
# docker/build.sh calls it; docs/image.md says how. Works alike on Ubuntu 24.04 (Python 3.12) and Debian 12 (3.11).

# -base, not -runtime: torch's wheels bring CUDA's libraries themselves, so the base only says what driver it needs.
ARG BASE_IMAGE=docker.io/nvidia/cuda:12.8.1-base-ubuntu24.04

# A folder of wheels to install from, beside the package index: --build-context wheels=FOLDER takes this one's place.
FROM scratch AS wheels

FROM ${BASE_IMAGE} AS environment
ARG TORCH_FLAVOUR=cuda
# Where this network has packages; a certificate comes as a secret. None of it reaches the image: this stage is left behind.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-pip
COPY docker/image.lock docker/torch-${TORCH_FLAVOUR}.lock /locks/
# A venv: nobody's ~/.local, which Apptainer brings along, goes before or beside what is locked. pathfm itself lies outside,
# in a layer of its own, and what PYTHONPATH names, such as a run's snapshot, goes before it.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=certificates \
    if [ -e /run/secrets/certificates ]; then export PIP_CERT=/run/secrets/certificates; fi \
 && python3 -m venv --without-pip /opt/pathfm/venv \
 && PIP_FIND_LINKS=/wheels python3 -m pip --python /opt/pathfm/venv/bin/python install \
      --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
      -r /locks/image.lock -r /locks/torch-${TORCH_FLAVOUR}.lock \
 && site=$(/opt/pathfm/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
 && echo /opt/pathfm/code > "$site/pathfm.pth" \
 && printf '%s\n' '#!/opt/pathfm/venv/bin/python' 'from pathfm.__main__ import main' '' 'raise SystemExit(main())' \
      > /opt/pathfm/venv/bin/pathfm \
 && chmod +x /opt/pathfm/venv/bin/pathfm

FROM ${BASE_IMAGE}
# gcc: what torch.compile needs at run time. Without it the image has no compiler.
ARG COMPILER=none
RUN apt-get update \
 && if [ "$COMPILER" = gcc ]; then compiler="gcc libc6-dev python3-dev"; fi \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      python3 ca-certificates libibverbs1 librdmacm1 ibverbs-providers ${compiler:-} \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log \
 && useradd --create-home --uid 10001 pathfm \
 && mkdir --mode 1777 /work
COPY --from=environment /opt/pathfm/venv /opt/pathfm/venv
# USER: a user given by number has no name in /etc/passwd, and torch.compile wants one for its cache.
ENV PATH=/opt/pathfm/venv/bin:$PATH LANG=C.UTF-8 USER=pathfm
WORKDIR /work
CMD ["pathfm"]

COPY . /opt/pathfm/code/
ARG TORCH_FLAVOUR=cuda
ARG COMMIT=unknown
ARG VERSION
ARG LOCK_HASH
# origin.json is where pathfm looks for the commit of code without git. What the labels say must be what is inside.
RUN cd /opt/pathfm && export PYTHONDONTWRITEBYTECODE=1 \
 && python code/docker/locks.py facts ${TORCH_FLAVOUR} "${COMMIT}" > image.json \
 && printf '{"commit": "%s", "diff": null}\n' "${COMMIT}" > code/origin.json \
 && python code/docker/locks.py agree image.json "${VERSION}" "${LOCK_HASH}" \
 && python -m compileall -q code \
 && chmod -R a+rX code image.json
LABEL org.opencontainers.image.title=pathfm \
      org.opencontainers.image.licenses=MIT \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${COMMIT} \
      org.pathfm.lock=${LOCK_HASH} \
      org.pathfm.flavour=${TORCH_FLAVOUR}
USER pathfm
