"""Runs one unit, forward and backward; knows leases and sinks, never where state lives."""
