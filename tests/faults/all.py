"""Every kind of fault that is tried."""

from tests.faults import ranks
from tests.faults.fault import Fault

FAULTS: list[Fault] = [*ranks.FAULTS]
