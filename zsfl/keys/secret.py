"""The key pair of this machine: CURVE keys, the secret one in a file that nobody else may read; and tokens, as well."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from zsfl.errors import ConfigError
from zsfl.ids import PublicKey
from zsfl.keys.aside import remove_leftovers, written_aside

KEY_FILE = "secret-key"
OTHERS_WRITE = 0o022
"""In a mode: group or others may write."""
_ABOUT = "# The secret key of this machine. Whoever reads it can pose as it: never copy it to another one.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """Both as Z85 text of 40 characters."""

    public: PublicKey
    secret: str = field(repr=False)


def keys_folder(named: str = "") -> Path:
    """Where keys are: the folder named, else `zsfl` in the user's folder for settings."""
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "zsfl"


def own_keys(folder: Path) -> KeyPair:
    """The key pair of this machine, made if there is none; ConfigError when its file is not safe or makes no sense."""
    if not zmq.has("curve"):
        raise ConfigError(
            "the ZeroMQ of this pyzmq is built without CURVE: install pyzmq as a wheel, `pip install pyzmq`"
        )
    path = folder / KEY_FILE
    try:
        make_folder(folder)
        remove_leftovers(path)  # each is as secret as the key itself, and may be the key itself
        if not path.exists():
            _make(path)
        check_private(path)
        secret = next(line for line in path.read_text(encoding="ascii").splitlines() if line and line[0] != "#")
        return KeyPair(public=PublicKey(zmq.curve_public(secret.strip().encode()).decode()), secret=secret.strip())
    except OSError as error:
        raise ConfigError(f"cannot keep keys in {folder}: {error.strerror}; name another folder with --keys") from error
    except (ValueError, StopIteration):
        raise ConfigError(
            f"{path} holds no secret key: remove it, and another one is made; then pair this machine again, and have "
            "the others revoke its former key"
        ) from None


def own_token(path: Path) -> str:
    """What a file beside the keys holds, which whoever shows it was given by this user; made if there is none."""
    try:
        make_folder(path.parent)
        if not path.exists():
            with written_aside(path, f"{secrets.token_urlsafe(24)}\n") as aside, suppress(FileExistsError):
                os.link(aside, path)
        check_private(path)
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot keep a token in {path}: {said}; name another folder with --keys") from error
    if len(token) < 16:
        raise ConfigError(f"{path} holds no token of 16 letters or more: remove it, and another one is made")
    return token


def make_folder(folder: Path) -> None:
    """The folder for keys, nobody else's business; ConfigError when others could write there."""
    with suppress(FileExistsError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    check_owner(folder)
    mode = folder.stat().st_mode
    if not stat.S_ISDIR(mode) or mode & OTHERS_WRITE:
        raise ConfigError(f"others may write in {folder}, and so trust whom they like: chmod 700 {folder}")


def check_owner(path: Path) -> None:
    """ConfigError when it is somebody else's, who may do with it as they like."""
    if path.stat().st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path} belongs to another user: chown it to yours, or name another folder with --keys")


def check_private(path: Path, what_for: str = "and so pose as this machine") -> None:
    """ConfigError, which ends in `what_for`, when anybody but the owner, this user or root, may read or write this."""
    check_owner(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is no file: remove it")
    if mode & 0o077:
        raise ConfigError(f"others may read {path}, {what_for}: chmod 600 {path}")


def _make(path: Path) -> None:
    """Write a new key pair aside and link it into place: of two at once one wins."""
    secret, public = b"", b"-"
    while public.startswith(b"-"):  # which a command line would take for an option
        public, secret = zmq.curve_keypair()
    with written_aside(path, f"{_ABOUT}{secret.decode()}\n") as aside, suppress(FileExistsError):
        os.link(aside, path)
