"""Engine: finds a model's units, streams them through the device, and keeps gradients and updates in order."""

from .engine import SlideEngine

__all__ = ["SlideEngine"]
