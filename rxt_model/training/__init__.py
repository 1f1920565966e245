"""Training of the small demo model that remembers, and the measurement of its recall."""
