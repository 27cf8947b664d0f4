"""Every kind of fault that is tried."""

from tests.faults import training
from tests.faults.fault import Fault

FAULTS: list[Fault] = [*training.FAULTS]
