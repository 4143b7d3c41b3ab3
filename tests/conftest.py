"""Settings and fixtures that every test file shares."""

from __future__ import annotations

from hypothesis import settings

# A shared machine stalls at times; an example that was slow once is no failure.
settings.register_profile("kvstrata", deadline=None)
settings.load_profile("kvstrata")
