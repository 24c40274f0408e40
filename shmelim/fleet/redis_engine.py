"""Redis (or Valkey), from protocol 7 on, as an engine: a stream, a head, hashes of chunks, reports that expire.

All keys of a name begin with ``shmelim:{NAME}:``, so that an ACL can name them, and a cluster keeps them together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shmelim.fleet.engine import HIGHEST, START, Engine, EngineError, Id, LogAheadError, Look
from shmelim.system.text import printable

DEADLINE: Final = 2.5
"""Seconds within which the engine has to answer, besides what was asked to be waited for."""
_OLDEST: Final = (7, 0)
_FIELD: Final = b"m"

# The head is compared, the entry appended (a stream refuses an id that is not above all others), and only then
# replaced: where appending fails, nothing has happened. KEYS head, log, snapshots; ARGV whether one is expected
# and which, the new one, id, entry, whether snapshots are dropped, the prefix of chunks, those that are kept.
_COMMIT: Final = """
local head = redis.call('GET', KEYS[1])
if ARGV[1] == '0' and head or ARGV[1] == '1' and head ~= ARGV[2] then return 0 end
redis.call('XADD', KEYS[2], ARGV[4], 'm', ARGV[5])
redis.call('SET', KEYS[1], ARGV[3])
if ARGV[6] == '1' then
  local kept = {}
  for i = 8, #ARGV do kept[ARGV[i]] = true end
  for _, name in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    if not kept[name] then
      redis.call('DEL', ARGV[7] .. name)
      redis.call('SREM', KEYS[3], name)
    end
  end
end
return 1
"""
# KEYS reports; ARGV the prefix of each. Names whose report has expired are dropped.
_REPORTS: Final = """
local found = {}
for _, who in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local report = redis.call('GET', ARGV[1] .. who)
  if report then
    found[#found + 1] = who
    found[#found + 1] = report
  else
    redis.call('SREM', KEYS[1], who)
  end
end
return found
"""

_RUNNING: Final = "is the engine at {place} running?"
_NOT_ABOVE: Final = ("equal or smaller", "exhausted the last possible ID")
_PERMIT: Final = "give this user the commands and keys that docs/fleet.md lists"
_UNKNOWN: Final = "name a user in the address, and the file with its password by --password-file"
_ELSEWHERE: Final = "this is a node of a cluster, and another one has the name: name that one"
_REFUSED: Final = "there is no user {user!r} there, or {password}"
# Of an error's class, or of its text, from which the client takes the code that it has a class for.
_HINTS: Final = (
    ("maxmemory", "the engine is full: give it more maxmemory, or free some; with maxmemory-policy noeviction"),
    ("Authentication required", _UNKNOWN),
    ("unauthenticated", _UNKNOWN),  # of a request with many arguments
    ("without any password", "the engine knows no password: leave out --password-file"),
    ("WRONGPASS", _REFUSED),
    ("invalid username-password", _REFUSED),
    ("password file", "have a file there that the user may read whom this runs as"),
    ("WRONGTYPE", "another program uses a key of {prefix}*: delete it, or publish under another --name"),
    ("NoPermissionError", _PERMIT),
    ("user executing the script", _PERMIT),
    ("ReadOnlyError", "this is a replica: name the primary"),
    ("MovedError", _ELSEWHERE),
    ("MOVED ", _ELSEWHERE),  # of an older client
    ("MISCONF", "the engine cannot save to its disk: see its log"),
    ("BusyLoadingError", "the engine is starting"),
    ("unknown command", "the engine is older than Redis 7.0"),
    ("CERTIFICATE_VERIFY_FAILED", "name the authority that vouches for it: rediss://…?ssl_ca_certs=FILE"),
)
_TLS_OPTIONS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
"""What an address may say besides; others of the client's options would undo what this module decides."""


class _PasswordFile(redis.CredentialProvider):
    """Reads the password anew for each connection."""

    def __init__(self, user: str | None, path: Path) -> None:
        self._user, self._path = user, path

    def read(self) -> str:
        return self._path.read_text(errors="replace").split("\n", 1)[0].strip()

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self.read()
        except OSError as error:
            # One of the client's own errors: after another one it would go on with this connection as it is.
            raise redis.AuthenticationError(f"the password file {self._path}: {error.strerror}") from error
        return (password,) if self._user is None else (self._user, password)


class RedisEngine(Engine):
    """One name in a Redis server, over one connection at a time, which is made anew after an error.

    ``url`` is ``redis://``, ``rediss://`` (TLS) or ``unix://``, with a user where there is one and no password;
    ValueError where it is none. The first line of ``password_file`` is read for each connection, and never shown;
    OSError where it cannot be read. The engine has to answer within ``deadline`` seconds.
    """

    def __init__(
        self, url: str, name: str, *, password_file: Path | None = None, deadline: float = DEADLINE
    ) -> None:
        self.place = place_of(url)
        options: dict[str, Any] = {}
        self._user = unquote(urlsplit(url).username or "") or None
        self._password_file = password_file
        if password_file is not None:
            options["credential_provider"] = password = _PasswordFile(self._user, password_file)
            password.read()
            url = re.sub("//[^/@]*@", "//", url, count=1)  # the client takes a user from one place only
        if url.startswith("rediss:"):
            options["ssl_check_hostname"] = True  # older clients do not by themselves
        self._prefix = f"shmelim:{{{name}}}:"
        self._redis = redis.Redis.from_url(
            url,
            **options,
            socket_timeout=deadline,
            socket_connect_timeout=deadline,
            # What was asked may have happened: the caller knows what that means, a blind repetition does not.
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            max_connections=2,
        )
        self._commit = self._redis.register_script(_COMMIT)
        self._reports = self._redis.register_script(_REPORTS)
        self._checked = False

    def _key(self, what: str) -> str:
        return self._prefix + what

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            if not self._checked:
                self._check()
            yield
        except (redis.RedisError, OSError) as error:
            raise self._error(error) from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise EngineError(
                f"the engine at {self.place} answered what no engine does: {printable(str(error))}",
                hint="does something else listen there?",
            ) from None

    def _error(self, error: Exception) -> EngineError:
        kind = type(error).__name__
        text = printable(str(error)) or kind
        if any(words in text for words in _NOT_ABOVE):
            return LogAheadError(
                f"the engine at {self.place}: the log has an entry that is above the newest one of its publishers",
                hint="something else writes there; the publisher goes on above it by itself",
            )
        file = self._password_file
        about = {
            "prefix": self._prefix,
            "user": self._user or "default",
            "password": "it needs a password: name its file by --password-file"
            if file is None
            else f"the password in {str(file)!r} is not that user's",
        }
        hint = next((hint for word, hint in _HINTS if word in text or word == kind), _RUNNING)
        return EngineError(f"the engine at {self.place}: {text}", hint=hint.format(place=self.place, **about))

    def _check(self) -> None:
        """Make sure that it is new enough, where it says."""
        try:
            about = self._redis.info("server")
        except redis.exceptions.NoPermissionError:
            self._checked = True
            return
        version = str(about.get("redis_version", ""))
        found = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
        if found < _OLDEST:
            raise EngineError(
                f"the engine at {self.place} is Redis {version}", hint="Redis 7.0 or later, or Valkey, is needed"
            )
        self._checked = True

    def look(self, after: Id | None = None, limit: int = 0, wait: float = 0.0) -> Look:  # noqa: D102
        with self._asking(), self._redis.pipeline(transaction=False) as asked:
            asked.time()
            asked.get(self._key("head"))
            asked.get(self._key("hold"))
            asked.xrange(self._key("log"), count=1)
            if after is not None:
                block = max(1, int(wait * 1000)) if wait > 0 else None
                asked.xread({self._key("log"): _text(after)}, count=limit, block=block)
            (seconds, micros), head, hold, first, *read = asked.execute()
            found = dict(read[0] or ()) if read else {}
            entries = [
                (_id(number), fields.get(_FIELD, b""))
                for number, fields in found.get(self._key("log").encode(), ())
            ]
            time = seconds * 1000 + micros // 1000
            if not 0 <= time <= HIGHEST:
                raise ValueError(f"its clock says {seconds}.{micros:06}")
            return Look(time, head, hold, _id(first[0][0]) if first else None, entries)

    def commit(  # noqa: D102
        self, expected: bytes | None, head: bytes, entry: tuple[Id, bytes], keep: Collection[str] | None = None
    ) -> bool:
        number, message = entry
        arguments: list[Any] = [int(expected is not None), expected or b"", head, _text(number), message]
        arguments += [int(keep is not None), self._key("chunks:"), *(keep or ())]
        with self._asking():
            return bool(
                self._commit(keys=[self._key(each) for each in ("head", "log", "snapshots")], args=arguments)
            )

    def top(self) -> Id:  # noqa: D102
        with self._asking():
            try:
                return _id(self._redis.xinfo_stream(self._key("log"))["last-generated-id"])
            except redis.ResponseError as error:
                if "no such key" in str(error):
                    return START
                raise

    def trim(self, before: Id) -> None:  # noqa: D102
        with self._asking():
            self._redis.xtrim(self._key("log"), minid=_text(before), approximate=False)

    def put(self, snapshot: str, number: int, chunk: bytes) -> None:  # noqa: D102
        with self._asking(), self._redis.pipeline(transaction=True) as asked:
            asked.sadd(self._key("snapshots"), snapshot)
            asked.hset(self._key(f"chunks:{snapshot}"), str(number), chunk)
            asked.execute()

    def fetch(self, snapshot: str, number: int) -> bytes | None:  # noqa: D102
        with self._asking():
            return cast("bytes | None", self._redis.hget(self._key(f"chunks:{snapshot}"), str(number)))

    def chunks(self, snapshot: str) -> int:  # noqa: D102
        with self._asking():
            return self._redis.hlen(self._key(f"chunks:{snapshot}"))

    def hold(self, why: bytes | None) -> None:  # noqa: D102
        with self._asking():
            if why is None:
                self._redis.delete(self._key("hold"))
            else:
                self._redis.set(self._key("hold"), why)

    def report(self, who: str, report: bytes | None, ttl: float) -> None:  # noqa: D102
        with self._asking(), self._redis.pipeline(transaction=True) as asked:
            if report is None:
                asked.srem(self._key("reports"), who)
                asked.delete(self._key(f"report:{who}"))
            else:
                asked.sadd(self._key("reports"), who)
                asked.set(self._key(f"report:{who}"), report, px=int(ttl * 1000))
            asked.execute()

    def reports(self) -> Mapping[str, bytes]:  # noqa: D102
        with self._asking():
            found = self._reports(keys=[self._key("reports")], args=[self._key("report:")])
            names = [who.decode(errors="replace") for who in found[::2]]
            return dict(zip(names, found[1::2], strict=True))

    def close(self) -> None:  # noqa: D102
        self._redis.close()


def place_of(url: str) -> str:
    """Return an address as it is shown, without options; ValueError where it is none, or has a password in it."""
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise ValueError(
            f"{parts.scheme or url!r}: an engine's address begins with redis://, rediss:// or unix://"
        )
    if parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path):
        raise ValueError(f"{printable(parts.path)}: an engine's address ends with the number of a database")
    options = parse_qs(parts.query, keep_blank_values=True).keys()
    if parts.password is not None or options & {"password", "ssl_password"}:
        raise ValueError(
            "the address has a password in it, which others can see: name its file by --password-file"
        )
    if unknown := sorted(options - (_TLS_OPTIONS if parts.scheme == "rediss" else frozenset())):
        raise ValueError(
            f"{printable(unknown[0])}: an engine's address has no such option; with rediss:// it may have "
            + ", ".join(sorted(_TLS_OPTIONS))
        )
    return url.partition("?")[0]


def _text(number: Id) -> str:
    return f"{number.term}-{number.number}"


def _id(text: bytes) -> Id:
    term, _, number = text.partition(b"-")
    return Id(int(term), int(number))
