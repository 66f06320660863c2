"""What operations launch at full size, compiled for sm_90a without a GPU: no spills, tensor cores, shared memory."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from minidsv3.kernels.registry import OPERATIONS

GATE = Path(__file__).with_name("compile_gate.py")
SHARED_LIMIT = 232_448              # bytes of shared memory that one block may have on sm_90
NAMES = [name for name, operation in OPERATIONS.items() if operation.shapes]


@cache
def compiled() -> dict[str, list[dict]]:
    """All operations' kernels, from one process: Triton decides when it is imported whether it interprets."""
    done = subprocess.run([sys.executable, GATE, *NAMES], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: [entry for entry in entries if entry["operation"] == name] for name in NAMES}


def faults(entry: dict) -> list[str]:
    """Sentences on what is wrong with one compiled kernel."""
    found = []
    if entry["stack"]:
        found.append(f"spills {entry['stack']} bytes of stack")
    if entry["LDL"] + entry["STL"]:
        found.append(f"reads or writes local memory {entry['LDL'] + entry['STL']} times")
    if entry["shared"] > SHARED_LIMIT:
        found.append(f"takes {entry['shared']} bytes of shared memory")
    if entry["multiplies"] and not entry["QGMMA"] + entry["HGMMA"]:
        found.append("multiplies matrices without Hopper's tensor-core instructions")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_hopper_within_its_means(name):
    assert compiled()[name], "nothing was launched"
    for entry in compiled()[name]:
        assert not faults(entry), entry


@pytest.mark.parametrize("change, sentence", [
    ({"stack": 8}, "spills 8 bytes"), ({"LDL": 1}, "local memory 1 times"), ({"shared": 240_000}, "240000 bytes"),
    ({"multiplies": True}, "without Hopper's tensor-core"),
])
def test_the_gate_sees(change, sentence):
    clean = {"operation": "rms_norm", "kernel": "_forward", "stack": 0, "LDL": 0, "STL": 0, "shared": 0,
             "multiplies": False, "QGMMA": 0, "HGMMA": 0}
    assert not faults(clean)
    assert any(sentence in fault for fault in faults(clean | change))
