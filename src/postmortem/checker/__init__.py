"""Adapters as files: what they hold, whether they fit a base, and what is wrong with them.

Nothing here imports torch or pandas.
"""
