"""Where records lie: memory, and what is below it."""
