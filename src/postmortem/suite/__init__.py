"""Many adapters at once, and which base an adapter belongs to."""
