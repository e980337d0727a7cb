"""A PostgreSQL version that is in no wheel and not on PATH, in a container where Docker answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mover.demo.servers import SETTINGS, Cluster

IN_A_CONTAINER = {"listen_addresses": "*", "unix_socket_directories": "/var/run/postgresql", "fsync": "off"}


def docker_answers() -> bool:
    import docker

    try:
        client = docker.from_env(timeout=5)
    except docker.errors.DockerException:
        return False
    client.close()
    return True


@contextmanager
def container(version: int) -> Iterator[Cluster | None]:
    """None when Docker does not answer."""
    if not docker_answers():
        yield None
        return
    from testcontainers.postgres import PostgresContainer

    settings = {**SETTINGS, **IN_A_CONTAINER}
    command = " ".join(f"-c {name}={value}" for name, value in settings.items() if " " not in value)
    image = PostgresContainer(f"postgres:{version}", username="postgres", dbname="postgres", driver=None)
    image.with_env("POSTGRES_HOST_AUTH_METHOD", "trust").with_command(command)
    with image as started:
        yield Cluster(version, started.get_container_host_ip(), int(started.get_exposed_port(5432)))
