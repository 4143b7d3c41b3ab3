"""What kvstrata costs, beside raw memory, the raw device and other caches. `make bench` runs it."""
