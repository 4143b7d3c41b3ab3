"""What several test files need: processes to talk to, values that tell whose they are."""
