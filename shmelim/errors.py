"""Every exception that shmelim raises on its own account, as one small hierarchy.

Bad arguments raise the built-in ``ValueError`` and ``TypeError``; everything else derives from
:class:`ShmelimError`. Where a built-in type says the same thing (``TimeoutError``, ``ConnectionError``,
``PermissionError``), the class derives from it too, so that callers who never heard of shmelim can handle it.
"""

from __future__ import annotations


class ShmelimError(Exception):
    """Base of every error of this package.

    Parameters
    ----------
    message
        What happened, naming the object and the value.
    hint
        What to do about it, one sentence; shown by the command line under the message.

    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} ({self.hint})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(cls: type[ShmelimError], message: str, hint: str | None) -> ShmelimError:
    return cls(message, hint=hint)


class UnsupportedPlatformError(ShmelimError):
    """The chosen code path depends on a guarantee that this machine does not give."""


class MissingExtraError(ShmelimError, ImportError):
    """What was asked for needs a package that is installed with an extra of shmelim; the hint names it."""


class NotServingError(ShmelimError, ConnectionError):
    """Nothing is served under that name: no writer has published yet, or its server cannot be reached."""


class FollowerError(NotServingError):
    """The table of that name follows one of another host, where its server is; nothing was changed here."""


class ReaderClosedError(ShmelimError):
    """The reader was closed, and reads no more."""


class StaleError(ShmelimError):
    """What is read is older than its reader allows, or of unknown age; the message names age, limit and source."""


class ChangesUnknownError(ShmelimError):
    """What changed since a version is not known any more: the server was started later, or it is too long ago."""


class AlreadyServingError(ShmelimError):
    """Another live process is the writer of that name, or uses that state directory."""


class SegmentError(ShmelimError):
    """A shared-memory segment could not be made, opened or used."""


class SegmentFullError(SegmentError):
    """No room for the segment: ``/dev/shm`` is full. The last published state stays as it was."""


class SegmentFormatError(SegmentError):
    """A segment was written by another format of the package."""


class CorruptSegmentError(SegmentError):
    """Bytes in shared memory contradict each other; the reader refused them."""


class UntrustedSegmentError(SegmentError, PermissionError):
    """A segment belongs to another user, or may be written by one."""


class StoreError(ShmelimError):
    """The state of record could not be read or written; the refused change was not applied."""


class StateConflictError(StoreError):
    """What is published or remembered under the name is not the state of this store; nothing was touched.

    The message names both sides with place, count and age, the hint the ways out.
    """


class DamagedStoreError(StoreError):
    """The state of record is damaged."""


class DamagedFileError(StoreError):
    """A JSON file of the state is damaged; the state of record is not touched by that."""


class SlashNotMadeError(ShmelimError):
    """A slash certainly moved nothing, so that it may be tried again; for a contract manager to raise.

    After every other error it stays unknown whether money moved, and the slash is not repeated.
    """


class StateUnavailableError(ShmelimError):
    """The processing of eliminations cannot reach the server, or the server cannot store anything."""


class GuardedChangeError(ShmelimError):
    """The change takes back or doubles so many eliminations that the server was told to refuse it."""


class EpochError(ShmelimError):
    """The call was made for a manager that another one has followed, or is the manager's alone to make.

    The message names both. Nothing was applied.
    """


class UploadLostError(ShmelimError, ValueError):
    """The server does not know the upload (any more); nothing of the list was applied."""


class ChannelError(ShmelimError, ConnectionError):
    """The command channel failed; unless a subclass says otherwise, the call was not carried out."""


class AuthenticationFailedError(ChannelError):
    """The two ends of the channel hold different keys."""


class AddressError(ChannelError, ValueError):
    """The address cannot be one: the path of a Unix socket is too long."""


class CallerFaultError(ChannelError):
    """The calling process cannot connect for want of its own: rights, files, descriptors, ports.

    It says nothing of the server, which may be well; a health check must not count it.
    """


class KeyFileError(CallerFaultError, PermissionError):
    """The channel's key file cannot be read or made, or others than its owner may know or change it."""


class ProtocolError(ChannelError):
    """The peer speaks another protocol, or sent something that is not a message of this one."""


class MessageTooLargeError(ChannelError, ValueError):
    """A message exceeds the channel's limit; it was not sent."""


class CallTimeoutError(ChannelError, TimeoutError):
    """No connection within the deadline; the call was not carried out."""


class OutcomeUnknownError(ChannelError, TimeoutError):
    """The request was sent and no answer came; the call may or may not have been carried out."""


class UnknownMethodError(ShmelimError, AttributeError):
    """The server has no remote method of that name."""


class NoTableError(ShmelimError, AttributeError):
    """The service names no table in which its server publishes anything."""


class NoCollaboratorsError(ShmelimError):
    """The object was asked to process eliminations, and does not hold the collaborators that this takes."""


class FleetDataError(ShmelimError):
    """What stands in the engine of a fleet is damaged, or not this package's; nothing of it was applied."""


class FencedError(ShmelimError):
    """Another publisher has taken over, and this one may send nothing more; it does not take back by itself."""


class OtherStoreError(ShmelimError):
    """The name in the engine belongs to another store."""


class RemoteError(ShmelimError):
    """The server raised an exception of a type that this process does not know."""
