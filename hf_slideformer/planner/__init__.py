"""Planner: bytes per tier from layouts and settings. Pure: reads no hardware, allocates nothing."""

from .plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
