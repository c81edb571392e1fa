"""Bases and adapters in memory: load, change, ask."""
