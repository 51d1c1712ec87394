"""Optimizer: `SlideAdamW`, per-parameter state, and the worker that updates host units."""

from .adamw import SlideAdamW

__all__ = ["SlideAdamW"]
