"""Each kind of fault, for a second; ``python -m tests.faults`` tries them for longer."""

import pytest

from tests.faults.all import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_nothing_is_lost(fault, tmp_path, seed):
    tried, lost = fault.run(seed, tmp_path, seconds=1)
    assert tried and not lost, "\n".join(lost)
