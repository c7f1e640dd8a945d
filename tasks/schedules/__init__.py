"""Schedules by measurement: for a latency, by what merging disturbs, or by search."""
