"""Typed errors: each message says what happened, with numbers, and what to do about it."""


class SlideFormerError(Exception):
    """Base of every error that hf_slideformer raises on purpose."""


class ConfigError(SlideFormerError, ValueError):
    """A setting that cannot be used: unknown key, unreadable size, or options that contradict each other."""


class PlanError(SlideFormerError):
    """The training state does not fit the memory that was given."""


class UnsupportedModelError(SlideFormerError):
    """The model, optimizer or training option cannot be streamed; the message names the alternative."""


class TransferError(SlideFormerError):
    """A copy between tiers, or an update that ran beside it, failed. The cause is chained."""


class StateError(SlideFormerError):
    """The engine was used in an order that cannot give the right numbers."""


class CheckpointError(SlideFormerError):
    """A checkpoint cannot be written or read back exactly."""


class DiskError(SlideFormerError, OSError):
    """Reading or writing state on disk failed: names the file, the offset, bytes wanted and got, and the cause."""


class ProbeError(SlideFormerError):
    """A machine cannot be measured: too little memory or disk is free, or a measurement failed."""
