"""Every kind of fault that is tried."""

from tests.faults import files
from tests.faults.fault import Fault

FAULTS: list[Fault] = [*files.FAULTS]
