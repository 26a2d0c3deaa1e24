"""make soak: a hundredth of it, and what it makes of promises that fail."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import soak
from conftest import ROOT
from mutants import tried

from data import InputError


def test_a_hundredth_of_it_holds(tmp_path):
    """A short form of each promise."""
    command = [sys.executable, ROOT / "tests" / "soak.py", "--share", "0.01", "--seed", "1", "--workers", "2"]
    done = subprocess.run([*command, "--out", tmp_path / "soak.json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["complete"] and found["seed"] == 1 and "SEED=1\n" in done.stdout
    assert [p["name"] for p in found["promises"]] == [*soak.PROMISES]
    for p, least in zip(found["promises"], (3, 5, 1000, 3, 3), strict=True):
        assert (p["tried"], p["held"], p["failed"], p["failures"]) == (least, least, 0, [])
        assert f"{p['what']}: {least:,} tried, {least:,} held, 0 failed" in done.stdout


@pytest.fixture
def made(monkeypatch, tmp_path):
    """made(f): (exit status, the file) where f is the one promise, of 12 cases."""
    monkeypatch.setattr(soak.World, "build", lambda self: self.folder.mkdir())

    def run(promise):
        monkeypatch.setattr(soak, "PROMISES", {"kills": ("It holds", 12)})
        monkeypatch.setattr(soak, "kills", promise)
        status = soak.soak(["kills"], 7, 1.0, 2, tmp_path / "soak.json")
        return status, json.loads((tmp_path / "soak.json").read_text())

    return run


def test_what_fails_is_counted_and_what_dies_is_gone_on_behind(made, capsys):
    def promise(world, folder, cases, seed):
        for n in cases:
            if n == 4:
                os.kill(os.getpid(), signal.SIGSEGV)
            if n == 6:
                raise KeyError("here")
            yield 1, "no" if n == 11 else None

    status, found = made(promise)
    (p,) = found["promises"]
    assert status == 1 and found["complete"] and (p["tried"], p["held"], p["failed"]) == (12, 9, 3)
    died, raised, failed = sorted(p["failures"], key=lambda text: ("kills 4: " not in text, "KeyError" not in text))
    assert died == f"kills 4: its process died ({-signal.SIGSEGV})" and "KeyError: 'here'" in raised and failed == "no"
    assert "It holds: 12 tried, 9 held, 3 failed" in capsys.readouterr().out


def test_what_was_tried_until_it_was_interrupted_is_written(made):
    def promise(world, folder, cases, seed):
        yield from ((1, None) for _ in cases[:1])
        if 0 in cases:
            time.sleep(0.3)
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
        yield 1, "too late"

    began = time.monotonic()
    status, found = made(promise)
    (p,) = found["promises"]
    assert (status, found["complete"]) == (130, False) and 1 <= p["tried"] == p["held"] <= 2
    assert time.monotonic() - began < 50


def test_damage_is_noticed(tmp_path):
    """Each kind of input: an error that is no InputError is one, and a message of two lines."""

    def raising(error):
        def case(rng):
            raise error

        return case

    assert tried(lambda rng: 1, random.Random(), "x 1") is None
    assert tried(raising(InputError("one line")), random.Random(), "x 1") is None
    long = InputError("")
    long.args = ("x" * 5000,)
    for error, says in ((KeyError("k"), "KeyError 'k'"), (SystemExit(2), "SystemExit"), (MemoryError(), "MemoryError"),
                        (long, "is not a line")):  # fmt: skip
        assert says in tried(raising(error), random.Random(), "x 1")
