"""Errors that distattn raises on purpose; everything else is a bug."""


class DistattnError(Exception):
    """Base of all errors below, so that one `except` can catch what distattn itself has to say."""


class ConfigError(DistattnError, ValueError):
    """A setting, or a combination of settings, that cannot work. The message is one sentence for the user."""


class PlanMismatch(DistattnError, RuntimeError):
    """Ranks disagree on the plan, the shapes, the dtypes, the versions, or on which exchange comes next.

    Raised on every rank; before anything is sent, unless a rank leaves out an exchange, or adds one, of a plan that was
    agreed on.
    """


class PeerLost(DistattnError, RuntimeError):
    """A rank is gone: its connections broke, it failed, or it was not heard of where ranks meet."""


class StepTimeout(DistattnError, RuntimeError):
    """An exchange did not end within its deadline: a rank is frozen, or too slow."""


class CheckpointError(DistattnError, RuntimeError):
    """A checkpoint could not be written or read, or is damaged; the message says which, on which rank, and why."""


class NotFinite(DistattnError, ArithmeticError):
    """A loss or a gradient is infinite or not a number; raised on every rank, before parameters are changed by it."""


class CacheFull(DistattnError, RuntimeError):
    """A cache has no room for what should be written; nothing was."""


class ServiceBusy(DistattnError, RuntimeError):
    """As many requests wait for the service as may wait; ask again later."""


class ServiceDead(DistattnError, RuntimeError):
    """The service has ended, or one of its ranks has, so that it can answer nothing any more."""
