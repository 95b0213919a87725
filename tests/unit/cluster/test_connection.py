"""The line about the cluster that a run prints when it starts."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private import node, worker
from ray._private.authentication import authentication_token_setup

from raykd.cluster import connection

SESSION = {"session_dir": "/mnt/scratch/ray/session_1"}


@pytest.fixture(autouse=True)
def _no_auth_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


def describe(address: str | None = None, **context: object) -> str:
    return connection.describe_cluster(SimpleNamespace(**context), address, Path("driver.log"))


def test_logs_are_in_session_folder():
    line = describe(dashboard_url="127.0.0.1:8265", address_info=SESSION)
    assert line.endswith("  dashboard: http://127.0.0.1:8265  logs: driver.log, /mnt/scratch/ray/session_1/logs")


def test_logs_of_existing_cluster_are_of_this_node():
    line = describe("10.0.0.1:6379", dashboard_url="", address_info=SESSION)
    assert "dashboard" not in line
    assert line.endswith("logs: driver.log, /mnt/scratch/ray/session_1/logs (this node; others keep their own)")


def test_ray_client_line_names_no_ray_logs():
    assert describe("ray://head:10001", dashboard_url="head:8265").endswith("logs: driver.log")


def test_token_command_is_shown_with_authentication(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    line = describe(dashboard_url="127.0.0.1:8265", address_info=SESSION)
    assert "http://127.0.0.1:8265 (`ray get-auth-token` prints its token)  logs:" in line
    assert "secret" not in line


def test_ray_reports_session_folder_and_sets_auth_mode():
    assert '"session_dir": self._session_dir' in inspect.getsource(node.Node.address_info.fget)  # type: ignore[attr-defined]
    assert "self.address_info = address_info" in inspect.getsource(worker.RayContext)
    assert authentication_token_setup.AUTH_MODE_ENV_VAR == connection.AUTH_MODE_VARIABLE
    assert 'os.environ[AUTH_MODE_ENV_VAR] = "token"' in inspect.getsource(authentication_token_setup)
