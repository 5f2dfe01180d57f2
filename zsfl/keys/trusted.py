"""The keys that this machine trusts: a text file, one key a line, as ssh's authorized_keys.

# KEY NAME ROLES, the roles parted by commas; without any, all of them
]{=qk]Mk:)*d+DoP.TP>]S%*aF7Uh>l!XsZu&9Gf lab-gpu split-server
Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID laptop
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from zmq.utils import z85

from zsfl.errors import NO_DESCRIPTORS, ConfigError, lacks_descriptors
from zsfl.ids import KEY_PATTERN, PublicKey, Role
from zsfl.keys.aside import written_aside
from zsfl.keys.machine import machine_id, read_machine_id
from zsfl.keys.secret import OTHERS_WRITE, check_owner, make_folder

TRUSTED = "trusted"
MAX_TRUSTED = 4096
"""Lines of one file; what follows is not read."""
LOCK_LOOKS, LOCK_LOOK_S = 100, 0.05
"""How often, and after what pause, to see whether another process is done with changing it."""
EVERY_ROLE = frozenset(Role)
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR})
"""Why a file cannot be read now that says nothing of the file."""
_ABOUT = "# The keys that this machine trusts: KEY NAME ROLES, the roles parted by commas; without any, all of them.\n"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trusted:
    """A machine that may connect, and what its nodes may be."""

    key: PublicKey
    name: str
    roles: frozenset[Role] = EVERY_ROLE

    def line(self) -> str:
        """As it stands in the file."""
        roles = "" if self.roles == EVERY_ROLE else " " + ",".join(sorted(self.roles))
        return f"{self.key} {self.name}{roles}"


def read_line(line: str) -> Trusted | None:
    """What a line says; None where it says nothing. ValueError says what is wrong with it."""
    words = line.split()
    if not words or words[0].startswith("#"):  # as no key does: its first five characters are a number below 2**32
        return None
    if len(words) > 3:
        raise ValueError("expected KEY NAME ROLES, the roles parted by commas and no blanks")
    key = read_key(words[0])
    name = words[1] if len(words) > 1 else machine_id(key)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: expected up to 63 letters, digits, dots, - and _")
    _check_own(key, name)
    return Trusted(key=key, name=name, roles=read_roles(words[2]) if len(words) > 2 else EVERY_ROLE)


def _check_own(key: PublicKey, name: str) -> None:
    """ValueError for a name that is the id of another machine, which a person would take it for."""
    with suppress(ConfigError):
        if read_machine_id(name) != machine_id(key):
            raise ValueError(f"{name} is no name but the id of a machine, and not of the one with this key")


def read_key(text: str) -> PublicKey:
    """A public key; ValueError when it is none."""
    try:
        if not re.fullmatch(KEY_PATTERN, text) or len(z85.decode(text)) != 32:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is no key: expected the 40 characters that `zsfl keys show` prints") from None
    except Exception as error:  # z85 has errors of its own for what is no Z85
        raise ValueError(f"{text!r} is no key: {error}") from None
    return PublicKey(text)


def read_roles(text: str) -> frozenset[Role]:
    """Roles parted by commas; ValueError names one that is none."""
    try:
        return frozenset(Role(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} are no roles: expected some of {', '.join(Role)}, parted by commas") from None


class TrustFile:
    """The file as it was last read, and this machine's own key, which may be anything."""

    def __init__(self, folder: Path, own: PublicKey, note: Callable[[str], None] = lambda _: None) -> None:
        """`note` is told, once for each, of lines that make no sense: these trust nobody."""
        self.path = folder / TRUSTED
        self._own = Trusted(key=own, name="this-machine")
        self._note = note
        self._noted: set[str] = set()
        self._seen: object = None
        self._known: Mapping[PublicKey, Trusted] = {own: self._own}
        self.refresh()

    @property
    def known(self) -> Mapping[PublicKey, Trusted]:
        """Whom this machine trusts, itself first."""
        return self._known

    def roles_of(self, key: str) -> frozenset[Role]:
        """What nodes with this key may be; none where it is not trusted."""
        entry = self._known.get(PublicKey(key))
        return entry.roles if entry else frozenset()

    def refresh(self) -> bool:
        """Read the file again if it has changed; whether that changed whom this machine trusts.

        A file that may not be read, or that others may write to, trusts nobody. Of one that cannot be read for the
        moment counts what was known, until it can.
        """
        stamp, before = self._stamp(), self._known
        if stamp != self._seen:
            try:
                self._known = {self._own.key: self._own} | {entry.key: entry for entry in self._entries()}
                self._seen = stamp
            except OSError as error:
                self._seen = None
                why = NO_DESCRIPTORS if lacks_descriptors(error) else f"{error.strerror}; see to that disk"
                self._say(f"cannot read {self.path} for the moment, and trusts whom it trusted before: {why}")
        return self._known != before

    def _stamp(self) -> object:
        """What changes when the file does, or the link to it, or who may write to it."""
        try:
            real = _real(self.path)
            file, folder = os.stat(real), os.stat(real.parent)
        except OSError as error:
            return error.errno
        told = (file.st_ino, file.st_size, file.st_mtime_ns, file.st_mode, file.st_uid)
        return *told, real, folder.st_mode, folder.st_uid

    def _entries(self) -> Iterator[Trusted]:
        try:
            real = _real(self.path)
            _check_safe(real)
            lines = real.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        except ConfigError as error:
            self._say(f"{error}; until then nobody in it is trusted")
            return
        except OSError as error:
            if error.errno in PASSING:
                raise
            self._say(f"cannot read {self.path} ({error.strerror}): until it can be, nobody in it is trusted")
            return
        for number, line in enumerate(lines[:MAX_TRUSTED], 1):
            try:
                entry = read_line(line)
            except ValueError as error:
                self._say(f"line {number} of {self.path} trusts nobody: {error}")
                continue
            if entry is not None and entry.key != self._own.key:
                yield entry

    def _say(self, message: str) -> None:
        if message not in self._noted and len(self._noted) < MAX_TRUSTED:
            self._noted.add(message)
            self._note(message)


def trust(folder: Path, entry: Trusted, *, rename: bool = False) -> Trusted:
    """Add a key, or change what it may be; the file's other lines stay as they are. What stands there now.

    ConfigError where another key has that name, unless a number may be added to it.
    """
    try:
        _check_own(entry.key, entry.name)
    except ValueError as error:
        raise ConfigError(f"cannot trust this machine: {error}") from None
    with _rewritten(folder) as lines:
        lines[:] = [line for line in lines if _key_in(line) != entry.key]
        if len(lines) >= MAX_TRUSTED:
            raise ConfigError(f"{folder / TRUSTED} has as many lines as are read, {MAX_TRUSTED}: remove some first")
        taken = {other.name for other in map(_entry_in, lines) if other}
        if entry.name in taken and not rename:
            raise ConfigError(
                f"{folder / TRUSTED} has another key named {entry.name}: choose another name, or revoke that one"
            )
        names = (entry.name, *(f"{entry.name[:58]}-{number}" for number in range(2, MAX_TRUSTED)))
        entry = replace(entry, name=next(name for name in names if name not in taken))
        lines.append(entry.line())
    return entry


def trust_as(folder: Path, key: str, name: str, roles: frozenset[Role]) -> None:
    """Let the nodes of a machine be this, beside whatever they may be already; `name` is for one that is new.

    ConfigError when the key is none, or the file cannot be changed.
    """
    try:
        new = Trusted(key=read_key(key), name=name, roles=roles)
    except ValueError as error:
        raise ConfigError(f"{name} has no proper key: {error}") from None
    known = next(iter(named(folder, key)), None)
    if known is None:
        trust(folder, new, rename=True)
    elif not known.roles >= roles:
        trust(folder, replace(known, roles=known.roles | roles))


def named(folder: Path, which: str) -> list[Trusted]:
    """Those with this key, name or machine id; ConfigError for an id in which a letter is wrong."""
    try:
        lines = (folder / TRUSTED).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return _named_in(lines, which)


def _named_in(lines: Iterable[str], which: str) -> list[Trusted]:
    entries = [entry for entry in map(_entry_in, lines) if entry]
    if found := [entry for entry in entries if which in (entry.key, entry.name)]:
        return found
    wanted = read_machine_id(which) if len(which) >= 28 and len(which) != 40 else None
    return [entry for entry in entries if machine_id(entry.key) == wanted]


def revoke(folder: Path, which: str) -> list[Trusted]:
    """Remove whatever has this key, name or machine id; what was removed. ConfigError when nothing has."""
    with _rewritten(folder) as lines:
        if not (gone := _named_in(lines, which)):
            raise ConfigError(f"{which!r} is no key, name or machine id in {folder / TRUSTED}: see `zsfl keys list`")
        keys = {entry.key for entry in gone}
        lines[:] = [line for line in lines if _key_in(line) not in keys]
    return gone


def _entry_in(line: str) -> Trusted | None:
    try:
        return read_line(line)
    except ValueError:
        return None


def _key_in(line: str) -> PublicKey | None:
    entry = _entry_in(line)
    return entry.key if entry else None


def _lock(descriptor: int, path: Path) -> None:
    for _ in range(LOCK_LOOKS):
        with suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(LOCK_LOOK_S)
    raise ConfigError(f"another process has been changing {path} for {LOCK_LOOKS * LOCK_LOOK_S:g} s: end it first")


def _real(path: Path) -> Path:
    """Where a file is that may be a link, as those who keep their settings elsewhere have it."""
    return Path(os.path.realpath(path))


def _check_safe(real: Path) -> None:
    """ConfigError when somebody else could change this file, or put another one in its place."""
    check_owner(real.parent)
    if real.parent.stat().st_mode & OTHERS_WRITE:
        raise ConfigError(f"others may write in {real.parent}, and so replace {real.name}: chmod go-w {real.parent}")
    check_owner(real)
    mode = real.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{real} is no file: remove it, or the link to it")
    if mode & OTHERS_WRITE:
        raise ConfigError(f"others may write to {real}: look whether all in it is yours, then chmod 600 {real}")


@contextmanager
def _rewritten(folder: Path) -> Generator[list[str], None, None]:
    """The lines of the file, which replace it as a whole afterwards; one at a time. A link to it stays one."""
    path = folder / TRUSTED
    try:
        make_folder(folder)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(descriptor, path)
            real = _real(path)
            text, mode = _ABOUT, 0o600
            with suppress(FileNotFoundError):
                _check_safe(real)
                text, mode = real.read_text(encoding="utf-8"), stat.S_IMODE(real.stat().st_mode)
            lines = text.splitlines()
            yield lines
            with written_aside(real, "".join(f"{line}\n" for line in lines), mode) as aside:
                aside.replace(real)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"cannot change {path}: {error.strerror}; name another folder with --keys") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8: correct it by hand") from None
