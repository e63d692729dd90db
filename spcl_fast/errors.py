"""What can go wrong, by exit code. The text says what failed, where, what was expected and what to do next."""


class SpclFastError(Exception):
    exit_code = 1


class ConfigError(SpclFastError):
    """An unknown key, a wrong type or an impossible combination of settings."""

    exit_code = 2


class DataError(SpclFastError):
    """A missing, broken or mismatching file of a dataset."""

    exit_code = 3


class NumericError(SpclFastError):
    """A loss that is not finite."""

    exit_code = 4


class CheckpointError(SpclFastError):
    """No whole checkpoint where one is needed, or one that does not belong to this run."""

    exit_code = 5


class OutOfMemory(SpclFastError):
    """A step did not fit into memory; the state before it was saved. The remedy is another setting, hence its exit code."""

    exit_code = 2


class Interrupted(SpclFastError):
    """Stopped by a signal after the state was saved; starting the same command again goes on."""

    exit_code = 75
