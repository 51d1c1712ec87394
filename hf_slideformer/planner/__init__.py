"""Planner: what lives where, and how fast that is. Pure: reads no hardware, allocates nothing."""

from .plan import Plan

__all__ = ["Plan"]
