"""Everything that moves records between tiers."""
