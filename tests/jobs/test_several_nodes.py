"""Several nodes by Ray's own cluster utility: placement, and the loss of a node in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raysys import machine

PROGRAM = Path(__file__).with_name("several_nodes_program.py")


@pytest.mark.cluster
@pytest.mark.timeout(700)
def test_a_lost_node_changes_nothing(tmp_path: Path, isolated_environment: dict[str, str]) -> None:
    environment = {
        **isolated_environment,
        "PYTHONPATH": str(machine.app_root()),
        # On a busy machine a new worker may need longer than Ray's minute, and is then begun anew.
        "RAY_worker_register_timeout_seconds": "240",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=650,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "result.json").read_text())
    assert len(set(seen["before"])) == 2, "the two workers shared a node"
    assert seen["before"][0] not in seen["after"]
    assert sorted(set(seen["rounds"])) == list(range(300))
    assert seen["replaced"] >= 1
    assert seen["disturbed"] == seen["undisturbed"], f"{seen['replaced']} replaced"
