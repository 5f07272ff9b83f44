# syntax=docker/dockerfile:1
# The service with its embedded engine, and everything that a setting can ask for (TLS, tokens, traces).
#   docker build --tag chat-history .
#   docker run -v data:/data -p 127.0.0.1:8000:8000 -e CHAT_INSECURE=true chat-history
# `--build-arg EXTRAS=jwt,otel` leaves the engine out, for use with a MongoDB (see docker-compose.yml).
FROM python:3.13-slim AS build
ARG EXTRAS=embedded,jwt,otel
WORKDIR /src
RUN python -m venv /app
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip

# First what is installed, which changes seldom, so an edit of the service installs nothing anew. Of the
# service there is only an empty package, without which its dependencies cannot be read.
COPY constraints.txt pyproject.toml ./
RUN --mount=type=cache,target=/var/cache/pip \
    mkdir service && touch README.md service/__init__.py && /app/bin/pip install ".[$EXTRAS]"
COPY README.md ./
COPY service ./service
RUN --mount=type=cache,target=/var/cache/pip \
    /app/bin/pip install --no-deps --force-reinstall . && /app/bin/python -m compileall -q /app/lib

FROM python:3.13-slim
COPY --from=build /app /app
# Not root. Of the image, only the data directory is this user's to write.
RUN useradd --system --uid 10001 --home-dir /data chat && install -d -o chat -g chat -m 0700 /data
USER 10001
WORKDIR /data
VOLUME /data
# Beyond the machine it wants authentication: give it CHAT_AUTH=key and a CHAT_API_KEY.
ENV PATH=/app/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    CHAT_HOST=0.0.0.0 CHAT_PORT=8000 CHAT_DATA_DIR=/data CHAT_LOG_FORMAT=json
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["chat-history", "health"]
ENTRYPOINT ["chat-history"]
CMD ["serve"]
