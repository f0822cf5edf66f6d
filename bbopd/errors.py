"""Errors a user can act on. Each message says what was wrong, with which value, and what to do."""

from __future__ import annotations


class BbopdError(Exception):
    """The base of all of them. The command line prints the message alone and exits with ``exit_code``."""

    exit_code = 1


class ConfigError(BbopdError):
    """A configuration that cannot run."""

    exit_code = 2


class ModelError(BbopdError):
    """A model that cannot be loaded, or does not fit its use."""

    exit_code = 2


class DataError(BbopdError):
    """Prompts or labelled text that cannot be used."""

    exit_code = 2


class TeacherError(BbopdError):
    """A teacher that cannot be reached, does not fit, or answered badly."""

    exit_code = 3


class BadAnswerError(TeacherError):
    """One teacher answer that failed validation; the request may be retried."""


class BudgetSpentError(TeacherError):
    """The money set aside for a teacher is spent: a run stops with a checkpoint, and goes on with a larger budget."""

    exit_code = 7


class TrainingError(BbopdError):
    """A training step that must not be applied (NaN, infinite gradient)."""

    exit_code = 4


class DivergedError(TrainingError):
    """Training goes wrong again each time it goes on from its last checkpoint, which stands: what came after it is not saved."""


class RolloutsRejectedError(TrainingError):
    """The filters let too few rollouts through for the run to be worth its time."""


class CheckpointError(BbopdError):
    """A checkpoint that cannot be written or read."""

    exit_code = 5


class EngineError(BbopdError):
    """A rollout engine that cannot be started, has died, or does not compute what the trainer does."""

    exit_code = 6


class RankError(BbopdError):
    """Another process of a run over several has failed, ended, or not answered in time."""

    exit_code = 8


class ClusterError(BbopdError):
    """A cluster that does not give, or keep, what a run needs."""

    exit_code = 9
