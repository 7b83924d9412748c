"""Runs that are killed at random end as one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_sixty_random_kills_change_nothing():
    script = Path(__file__).with_name("random_kills.py")
    result = subprocess.run([sys.executable, script, "--kills", "60"], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "\n60 kills: " in result.stdout
