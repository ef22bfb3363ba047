"""What can go wrong by the user's hand or the machine's, and the exit code each failure ends a stage with.

An `assert` is for our own invariants; everything a person can cause or mend is one of these.
"""


class TokscaleError(Exception):
    """A failure with a message for a person: the path, the value and the way out."""

    exit_code = 1


class ConfigError(TokscaleError):
    """A key, a value or a combination of options that cannot be honoured."""

    exit_code = 64


class DataError(TokscaleError):
    """Data or a manifest that is damaged, missing, or made for something else."""

    exit_code = 65


class EnvironmentRefused(TokscaleError):  # noqa: N818 - reads as what happened
    """The machine or the installation cannot do this: preflight, self-check, a held lock, a missing tool."""

    exit_code = 69


class StorageError(TokscaleError):
    """The file system refused: disk full, quota, permission."""

    exit_code = 74


class StopRequested(TokscaleError):  # noqa: N818
    """Not a failure: asked to stop by a signal or a deadline, and the state is saved."""

    exit_code = 75

    def __init__(self, message: str, *, again: bool = True, exclude: tuple[str, ...] = ()):
        """Ends a stage.

        Args:
            message: Why, and what is saved.
            again: Whether a scheduler should start the job again; not when a person asked it to stop.
            exclude: Nodes that it should leave out then, by the scheduler's names.
        """
        super().__init__(message)
        self.again, self.exclude = again, exclude


class StalledError(TokscaleError):
    """No progress for longer than the watchdog allows."""

    exit_code = 76


class PeerLostError(StalledError):
    """Another rank of the job is gone: it failed, was killed, or its machine did."""


class NonFiniteError(TokscaleError):
    """The loss or the gradient stayed non-finite beyond the configured limit."""

    exit_code = 77


class CheckpointError(TokscaleError):
    """A checkpoint or export that is incomplete, damaged, or not loadable here."""

    exit_code = 78
