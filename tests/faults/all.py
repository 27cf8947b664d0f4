"""Every kind of fault that is tried."""

from tests.faults import files, memory, ranks, training
from tests.faults.fault import Fault

FAULTS: list[Fault] = [*files.FAULTS, *memory.FAULTS, *ranks.FAULTS, *training.FAULTS]
