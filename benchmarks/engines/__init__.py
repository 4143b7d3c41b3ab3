"""Measurements in inference engines, beside what these have themselves. They need what `make test-engines` installs."""
