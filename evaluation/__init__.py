"""Measuring what a region does: prompt sets, metrics, tables."""
