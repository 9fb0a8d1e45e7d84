"""Random operations on many small worlds, with everything checked after each (R5, R6)."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


driver = load("random_driver")
seeded_bugs = load("seeded_bugs")


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_no_operation_breaks_an_invariant_and_no_block_leaks(seed):
    """SCHED-12, EN-13: the long runs are `random_driver.py --operations 100000`."""
    totals = driver.run(2500, seed)
    assert totals["blocks_leaked"] == 0
    for name in driver.COUNTED:
        assert totals[name] > 0, f"{name}: the worlds are too calm to prove anything"


def test_a_run_can_be_repeated():
    assert driver.run(300, 5) == driver.run(300, 5)


@pytest.mark.parametrize("mutant", seeded_bugs.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_bug_has_its_place_in_the_source(mutant):
    """R6: `mutants.py` runs them all; here, that none has become stale."""
    folder = HERE.parents[2] / "pagedcore" / "scheduling"
    source = (folder / f"{mutant.module}.py").read_text()
    changed = mutant.apply(source)
    assert changed != source
    compile(changed, mutant.module, "exec")


def test_the_driver_notices_a_bug(monkeypatch, capsys):
    """The checks check: a pool that gives cached blocks away first."""
    pool = sys.modules["pagedcore.scheduling.blocks"].BlockPool
    honest = pool.release

    def careless(self, blocks):
        honest(self, [*blocks][1:])

    monkeypatch.setattr(pool, "release", careless)
    with pytest.raises(AssertionError):
        driver.run(500, 1)
    assert "seed 1, world 0, operation" in capsys.readouterr().out
