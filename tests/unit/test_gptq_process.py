"""What GPTQ does to its process: memory, output, and the log of others. Seen from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COLUMNS = 6144
SCRIPT = f"""
import json, sys
import torch
from loguru import logger
from mmr5_export.gptq import gptq
from mmr5_kernels.layout import INT4

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))

torch.set_num_threads(1)
heard = []
logger.remove()
logger.add(heard.append)
small = torch.Generator().manual_seed(0)
gptq(torch.randn(4, 128, generator=small), torch.eye(128), INT4, name="imports the library")

inputs = torch.randn(64, {COLUMNS}, generator=small)
hessian = torch.zeros({COLUMNS}, {COLUMNS}).addmm_(inputs.T, inputs)
weight = torch.randn(32, {COLUMNS}, generator=small)
gptq(weight, hessian, INT4, name="touches the pages of the libraries it runs in")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts from here
before = memory("VmRSS")
gptq(weight, hessian, INT4, name="x")
peak = memory("VmHWM")
logger.info("still heard")
print(json.dumps({{"heard": heard, "extra": peak - before}}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak memory of a piece of code is only known on Linux")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path_factory.mktemp("process"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)  # and nothing but it was printed
    return result


def test_one_more_hessian_is_all_it_takes(seen: dict[str, Any]) -> None:
    """The working copy, and buffers of a fixed size.

    The library's own ordering takes two more Hessians, a row-major working copy one.
    """
    hessian = COLUMNS * COLUMNS * 4
    assert hessian < seen["extra"] < 1.8 * hessian


def test_log_of_the_process_is_left_alone(seen: dict[str, Any]) -> None:
    assert len(seen["heard"]) == 1 and "still heard" in seen["heard"][0]
