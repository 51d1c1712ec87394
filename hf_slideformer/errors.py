"""Typed errors: each message says what happened, with numbers, and what to do about it."""


class SlideFormerError(Exception):
    """Base of every error that hf_slideformer raises on purpose."""


class ConfigError(SlideFormerError, ValueError):
    """A setting that cannot be used: unknown key, unreadable size, or options that contradict each other."""


class PlanError(SlideFormerError):
    """The training state does not fit the memory that was given."""


class UnsupportedModelError(SlideFormerError):
    """The model, optimizer or training option cannot be streamed; the message names the alternative."""


class UnsupportedVersionError(SlideFormerError, ImportError):
    """A package is installed in a version that lacks, or no longer calls, what is built on; names both."""


class TransferError(SlideFormerError):
    """A copy between tiers, or an update that ran beside it, failed. The cause is chained."""


class StateError(SlideFormerError):
    """The engine was used in an order that cannot give the right numbers."""


class CheckpointError(SlideFormerError):
    """A checkpoint cannot be written or read back exactly."""


class DiskError(SlideFormerError, OSError):
    """Reading or writing state on disk failed: names the file, the offset, bytes wanted and got, and the cause.

    Attributes:
        filename: of the file, or the directory that was refused.
        offset: in that file, where the transfer began.
        wanted: bytes that were asked for.
        got: bytes that were moved before the failure, or, where space was reserved, bytes that are free.
        errno: the system's error number; None where it gave none, as for a transfer that came to a halt.
    """

    def __init__(
        self,
        message: str = "",
        *,
        filename: str | None = None,
        offset: int | None = None,
        wanted: int | None = None,
        got: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.filename = filename
        self.offset = offset
        self.wanted = wanted
        self.got = got
        self.errno = errno

    def __str__(self) -> str:
        return self.message  # OSError would make its own from errno and filename


class ProbeError(SlideFormerError):
    """A machine cannot be measured: too little memory or disk is free, or a measurement failed."""
