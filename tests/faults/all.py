"""Every kind of fault that is tried."""

from tests.faults import memory, ranks
from tests.faults.fault import Fault

FAULTS: list[Fault] = [*memory.FAULTS, *ranks.FAULTS]
