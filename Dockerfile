# The daemon in an image: psycopg's C build, pg_dump 18, no compiler, not root.
#
#   docker build --tag mover .
#   docker run --rm --publish 8080:8080 --volume ./mover.toml:/etc/mover/mover.toml:ro \
#       --env MOVER__API__LISTEN=0.0.0.0:8080 --env DATABASE_URL … mover
#
# Both stages begin with the same base, so that the virtual environment fits where it is copied to.
FROM python:3.11-slim-bookworm AS build

# libpq's headers for psycopg's C build; postgresql-common for the key of PostgreSQL's own packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential libpq-dev postgresql-common \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md ./
COPY mover mover
COPY cutover cutover
COPY verify verify
RUN python -m venv /opt/mover && /opt/mover/bin/pip install --no-cache-dir '.[c]'


FROM python:3.11-slim-bookworm

# pg_dump reads servers up to its own version: Debian's 15 would clone from 15 alone, 18 clones from
# 15, 16, 17 and 18. The one in the wheel that the demo uses is built without TLS, so it is not this one.
COPY --from=build /usr/share/postgresql-common/pgdg/apt.postgresql.org.asc /usr/share/keyrings/postgresql.asc
# hadolint ignore=DL3008
RUN echo 'deb [signed-by=/usr/share/keyrings/postgresql.asc] https://apt.postgresql.org/pub/repos/apt bookworm-pgdg main' \
        > /etc/apt/sources.list.d/postgresql.list \
    && apt-get update \
    && apt-get install --yes --no-install-recommends libpq5 postgresql-client-18 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin mover

COPY --from=build /opt/mover /opt/mover
ENV PATH=/opt/mover/bin:$PATH PYTHONUNBUFFERED=1

USER 10001
EXPOSE 8080
# SIGTERM lets every migration rest at a safe point within 10 s, which is what `docker stop` waits for.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "mover"]
CMD ["serve", "--config", "/etc/mover/mover.toml"]
