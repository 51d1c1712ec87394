"""The demo's one kind of expected failure."""


class DemoError(Exception):
    """The demo cannot go on; the message says what is wrong and what to do. Shown without a traceback."""
