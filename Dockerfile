# The server with its demo model, and de3 import: docker build -t de3 .
# The server drains when stopped: docker run --read-only --stop-timeout 40 -p 8000:8000 de3
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/de3
WORKDIR /src
# Dependencies change less often than the code, so they have their own layer.
COPY requirements.lock ./
RUN /opt/de3/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements.lock
COPY . .
# The lock has setuptools, so nothing is installed without a hash.
RUN /opt/de3/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    # Nothing is installed at run time, and the tests of libraries are not needed.
    && /opt/de3/bin/pip uninstall --yes setuptools pip \
    # The image holds the demo model once, in /models.
    && cd /opt/de3/lib/python3*/site-packages/de3 && rm -r demo && ln -s /models demo \
    && find /opt/de3 -type d -name tests -prune -exec rm -rf {} +

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="de3" \
      org.opencontainers.image.description="Text classifiers that exit early (DE3-BERT)" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/de3 /opt/de3
COPY models /models
# /state: results of audits, if DE3_STATE_DIR=/state. A new volume takes the owner of the folder.
# /cache: classifiers served by name, and their downloads.
RUN install --directory --owner 10001 --group 10001 /state /cache
ENV PATH=/opt/de3/bin:$PATH PYTHONUNBUFFERED=1 DE3_HOST=0.0.0.0 DE3_PORT=8000 DE3_STORE=/models \
    DE3_CACHE=/cache HF_HOME=/cache/huggingface
USER 10001:10001
WORKDIR /
EXPOSE 8000
# Not urllib, which would use the container's proxy.
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 CMD ["python3", "-c", "\
import http.client, os, sys; \
c = http.client.HTTPConnection('127.0.0.1', int(os.environ['DE3_PORT']), timeout=5); \
c.request('GET', '/ready'); \
sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["de3"]
CMD ["serve"]
