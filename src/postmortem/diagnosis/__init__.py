"""Causes and the tests that tell them apart: likelihoods, beliefs, the next test."""
