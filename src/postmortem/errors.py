"""One exception per outcome, each saying whose input, what was expected, found, and what to do."""


class PostmortemError(Exception):
    """A failure that its user can act on.

    `subject` names the file or thing at fault. The command line prints the message without a
    traceback and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(
        self, subject: object, *, expected: str = "", found: str = "", remedy: str = ""
    ) -> None:
        self.subject, self.expected, self.found, self.remedy = (
            str(subject),
            expected,
            found,
            remedy,
        )
        parts = [self.subject]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        message = "; ".join([": ".join(parts[:2]), *parts[2:]])
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)


class CaseError(PostmortemError):
    """The case file, or a file it names, cannot be used."""


class DataError(PostmortemError):
    """The rows or the labels cannot be used."""


class ModelError(PostmortemError):
    """A model or adapter folder cannot be loaded."""


class WeightsError(PostmortemError):
    """Packaged weights could not be fetched, verified or converted."""


class WorldError(PostmortemError):
    """The embedded world did not reach its training criterion."""


class SuiteError(PostmortemError):
    """A suite names no adapter, prompt or rows, or its steps did not all succeed."""


class ClusterError(PostmortemError):
    """The graph cannot be run where it was asked to be: a profile, plugin or cluster is missing."""


class ParameterError(PostmortemError):
    """A notebook was given parameters that it does not declare, or not those it needs."""


class NotebookFailed(PostmortemError):
    """A notebook raised, timed out, lost its kernel, or left cells unexecuted."""


class NotebookNotStarted(PostmortemError):
    """A notebook could not be started at all."""


class RecordError(PostmortemError):
    """A record is missing, incomplete, altered or stale."""


class DiagnosisError(PostmortemError):
    """The replays, the prior or the observations cannot be reasoned from."""


class BookError(PostmortemError):
    """The book could not be built from the records."""
