"""InputError: what a user can act on, and its few kinds."""


class InputError(Exception):
    """Something outside the program is wrong; its text is one line: what, where, expected, what to do next.

    The command lines print it as `error: ...` and exit with status 1; a traceback is for bugs only.
    """


class AudioError(InputError):
    """One clip could not be used: `reason` is one of `pipeline.manifest.REASONS`, the text says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class ManifestError(InputError):
    """A segments list, class list or manifest is not what it should be."""


class OntologyError(InputError):
    """A class tree or label set contradicts itself."""


class StoreError(InputError):
    """A feature store is absent, damaged, of another kind than expected, or in use."""


class RunError(InputError):
    """A training run, its recipe or its device is not what was asked for."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: stop as soon as nothing is lost. Not an error, and nobody's to swallow."""
