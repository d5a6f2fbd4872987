"""What every test shares: how hypothesis searches.

By default each property is tried with the same examples on every run, so a red test is red for everybody. `make fuzz`
searches afresh instead, as long as MPD_FUZZ_EXAMPLES says, and keeps what it finds in `.hypothesis/`.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,  # a busy machine is not a bug
    print_blob=True,
)
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("MPD_FUZZ_EXAMPLES", "10000")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
