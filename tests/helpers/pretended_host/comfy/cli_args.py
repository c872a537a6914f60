"""Says which arguments a host knows: none."""
