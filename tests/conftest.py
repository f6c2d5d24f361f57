"""Fixtures and hypothesis profiles for the whole suite.

Profiles: `ci` (the default) is quick and always the same; `long`, chosen by the environment
variable HYPOTHESIS_PROFILE, looks for new cases.
"""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.support import FACES, Face

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "long",
    deadline=None,
    max_examples=5000,
    stateful_step_count=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# What nohup, or a shell's `&`, has had ignored: the programs that tests start would never be ended by it.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(params=FACES, ids=repr)
def face(request: pytest.FixtureRequest) -> Face:
    """The blocking face, then the asyncio face."""
    chosen: Face = request.param
    return chosen
