"""How many inputs a fuzz test tries, and the figures that it leaves."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

COUNT = int(os.environ.get("FUZZ", "500"))
"""Inputs per test: the same 500 in `make test`; 20,000 others each time in `make fuzz`."""

settings.register_profile(
    "fuzz",
    max_examples=COUNT,
    derandomize="FUZZ" not in os.environ,
    database=None,  # a failure prints its input, and nothing is kept between runs
    deadline=None,  # the rule is CPU time, see outcome.py
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each fuzz test counted."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == "fuzz":
                    terminalreporter.write_line(f"{report.nodeid}: {value}")
