# The service alone, for use with a MongoDB of its own (see docker-compose.yml).
FROM python:3.13-slim

WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY service ./service
RUN PIP_CONSTRAINT=constraints.txt pip install --no-cache-dir .

# Not root, and nothing in the image is this user's to write.
RUN useradd --system --uid 10001 chat
USER 10001

# Beyond the machine it wants authentication: give it CHAT_AUTH=key and a CHAT_API_KEY.
ENV CHAT_HOST=0.0.0.0 CHAT_PORT=8000 CHAT_LOG_FORMAT=json
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=12 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["chat-history", "serve"]
