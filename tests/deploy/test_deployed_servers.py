"""The image, the compose file, the unit and the nginx site agree with the server and each other."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from pagedcore.cli import main
from pagedcore.server_config import ServerConfig

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
OF_OTHERS = {
    "--build",
    "--build-arg",
    "--create-home",
    "--gpus",
    "--index-url",
    "--interval",
    "--no-install-recommends",
    "--now",
    "--retries",
    "--rm",
    "--start-period",
    "--time",
    "--timeout",
    "--uid",
    "--from",
}
"""Flags in deploy/ that are Docker's, pip's, apt's or systemctl's."""

NAMING_FLAGS = (
    "Dockerfile",
    "README.md",
    "compose.yaml",
    "nginx.conf",
    "pagedcore.service",
    "prometheus/prometheus.yml",
    "prometheus/rules.yml",
)


@pytest.fixture(scope="module")
def serve_flags():
    """Every flag that `pagedcore serve --help` shows; its help is for people, so it is wrapped."""
    from pagedcore.cli.flags import engine_parameters, parameters

    names = [flag.name for flag in (*parameters(ServerConfig), *engine_parameters())]
    flags = {f"--{name.replace('_', '-')}" for name in names}
    return flags | {"--model", "--server"}


def arguments(text):
    """The words behind `pagedcore serve`."""
    words = shlex.split(text)
    return words[words.index("serve") + 1 :]


def seconds(text, flag):
    return float(re.search(rf"{flag}[\", =]+(\d+)", text)[1])


@pytest.mark.parametrize("name", NAMING_FLAGS)
def test_flags_that_deployment_names_exist(read, serve_flags, name):
    assert set(FLAG.findall(read(name))) - OF_OTHERS - serve_flags == set()


def test_the_flags_of_the_unit_and_the_image_are_understood(read, unit, monkeypatch):
    calls = []
    monkeypatch.setattr("pagedcore.cli.serve.load_plugins", lambda disabled, only: disabled)
    monkeypatch.setattr("pagedcore.cli.serve._check_address", lambda host, port: None)
    monkeypatch.setattr(
        "pagedcore.cli.serve.choose", lambda *_: lambda *configs: calls.append(configs) or 0
    )
    (command,) = unit["Service"]["ExecStart"]
    words = arguments(command.replace(" --api-key-file %d/keys", "").replace(" $ARGS", ""))
    assert main(["serve", *words, "--server", "asgi"]) == 0
    entry = re.search(r"^ENTRYPOINT \[(.*)\]$", read("Dockerfile"), re.M)[1]
    assert main(["serve", *arguments(entry.replace(",", " "))]) == 0
    unit_server, image_server = (server for _, server in calls)
    assert (unit_server.host, unit_server.shutdown_timeout) == ("127.0.0.1", 60)
    assert (image_server.host, image_server.port) == ("0.0.0.0", 8000)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_finds_nothing_wrong_with_the_unit(read, tmp_path):
    copy = tmp_path / "pagedcore.service"
    copy.write_text(read(copy.name).replace("/opt/pagedcore/bin/pagedcore", sys.executable))
    result = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60
    )
    assert result.stderr + result.stdout == ""
    assert result.returncode == 0


def test_the_unit_lets_the_main_process_drain(unit):  # LIFE-4
    service = unit["Service"]
    assert service["KillMode"] == ["mixed"]
    drain = seconds(service["ExecStart"][0], "--shutdown-timeout")
    assert float(service["TimeoutStopSec"][0]) >= drain + 20


def test_the_unit_shuts_itself_in(unit):
    service = unit["Service"]
    for name in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictNamespaces"):
        assert service[name] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]
    assert "--api-key-file" in service["ExecStart"][0]


def test_the_image_is_not_root_and_is_ready_when_the_server_is(read):
    stages = read("Dockerfile").split("\nFROM ")
    last = stages[-1]
    assert re.search(r"^USER (?!root|0)\w+$", last, re.M)
    assert re.search(r"^HEALTHCHECK", last, re.M)
    assert "/readyz" in last


def test_the_image_has_every_member_but_triton(read, members):
    listed = set(re.search(r'^ARG MEMBERS="(.*)"$', read("Dockerfile"), re.M)[1].split())
    assert listed == members - {"adapters/pytriton"}
    ignored = read("Dockerfile.dockerignore").split()
    for folder in members | {"pagedcore"}:
        assert f"!{folder.split('/')[0]}" in ignored


def test_compose_waits_longer_than_the_image_drains(read, parse):
    service = parse("compose.yaml")["services"]["pagedcore"]
    drain = seconds(read("Dockerfile"), "--shutdown-timeout")
    assert float(service["stop_grace_period"].removesuffix("s")) >= drain + 20


def test_compose_publishes_to_this_machine_only_and_asks_for_a_key(parse):
    services = parse("compose.yaml")["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "--api-key-file" in services["pagedcore"]["command"]
    key = services["pagedcore"]["command"][-1]
    (job,) = parse("prometheus/prometheus.yml")["scrape_configs"]
    assert job["authorization"]["credentials_file"] == key
    assert parse("compose.yaml")["secrets"].keys() == {key.rpartition("/")[2]}


def test_what_compose_mounts_is_there(parse, root):
    for name in ("compose.yaml", "compose.gpu.yaml"):
        for service in parse(name)["services"].values():
            for volume in service.get("volumes", []):
                if volume.startswith("./"):
                    assert (root / "deploy" / volume.split(":")[0]).is_dir(), volume
    folder = parse("grafana/provisioning/dashboards/pagedcore.yml")["providers"][0]["options"]
    grafana = parse("compose.yaml")["services"]["grafana"]["volumes"]
    assert any(volume.split(":")[1] == folder["path"] for volume in grafana)


def test_nginx_takes_bodies_and_headers_as_large_as_the_server(read):
    site, server = read("nginx.conf"), ServerConfig(api_key=())
    limit = int(re.search(r"client_max_body_size (\d+)m;", site)[1])
    assert limit * 2**20 == server.max_request_bytes
    count, kib = map(int, re.search(r"large_client_header_buffers (\d+) (\d+)k;", site).groups())
    assert count * kib * 2**10 == server.max_header_bytes
    assert seconds(site, "client_body_timeout") == server.http_read_timeout


def test_nginx_passes_streams_on_at_once(read):
    site = read("nginx.conf")
    for line in ("proxy_buffering off;", "gzip off;", "proxy_http_version 1.1;"):
        assert line in site
    assert seconds(site, "proxy_read_timeout") >= 600


def test_the_nginx_site_is_well_formed(read):
    depth = 0
    for line in read("nginx.conf").splitlines():
        text = line.split("#")[0].strip()
        depth += text.count("{") - text.count("}")
        assert depth >= 0
        assert not text or text[-1] in "{};", line
    assert depth == 0
