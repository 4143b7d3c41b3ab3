"""Disk engines for many small records, beside the host's index: each is a RecordStore in a directory of its own."""
