"""The commands about keys, and what they print: `zsfl keys`, `zsfl invite`, `zsfl join`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsfl.errors import ConfigError
from zsfl.ids import PublicKey, Role
from zsfl.settings import NodeSettings, add_flags, load_settings
from zsfl.words import number_of

INVITE_EXAMPLES = """\
examples, to pair two machines, once:
  zsfl invite                                   on the one; it prints the command for the other, and waits
  zsfl join zsfl1.kpKwMTkyLjE2OC4xLjEwOjc3MDHE  on the other, with the token that was printed
  zsfl join zsfl1.kpKwMTkyLjE2OC4xLjEwOjc3MDHE --name gpu   what the one is to call the other
  zsfl join -                                   asks for the token, or reads it from a pipe: no list of processes and
                                                no history of the shell shows it
  zsfl invite --roles client                    what the machine that joins may be here: a client and nothing else
  zsfl invite --host 192.168.1.10 --port 7701   where the other one is to ask

From then on each trusts the other, and nodes with --host ADDRESS find one another, and are encrypted, without flags.
The token is a secret: whoever has it first joins. It is good for one machine, and for ten minutes.
"""
KEYS_EXAMPLES = """\
examples:
  zsfl keys show                                this machine's id, and how another one comes to trust it by hand
  zsfl keys show --keys /etc/zsfl               the same of another folder, as of every command
  zsfl keys list                                whom this machine trusts, and as what
  zsfl keys list --keys /etc/zsfl
  zsfl keys trust 'Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID' laptop
  zsfl keys trust 'Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID' laptop client,split-server
  zsfl keys trust laptop laptop client          from now on it may be a client and nothing else
  zsfl keys revoke laptop                       running nodes let go of it at once
  zsfl keys revoke NN2EBXH-5HMSMMA-QNCDJYU-YCW4DYB

The file `trusted` in the folder of the keys has a line for each: KEY NAME ROLES, the roles parted by commas, or none
for all of them; # begins a comment. It may be edited, and copied from machine to machine. Running nodes read it again.
"""
Parser = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, make: Parser) -> None:
    """Give the command line `keys`, `invite` and `join`."""
    keys = make(commands.add_parser, "keys", help="whom this machine trusts", epilog=KEYS_EXAMPLES)
    orders = keys.add_subparsers(title="orders", required=True, metavar="ORDER")
    show = make(orders.add_parser, "show", help="the id and the key of this machine", epilog=KEYS_EXAMPLES)
    show.set_defaults(run_command=_show)
    listed = make(orders.add_parser, "list", help="whom this machine trusts, and as what", epilog=KEYS_EXAMPLES)
    listed.set_defaults(run_command=_list)
    trusted = make(orders.add_parser, "trust", help="trust a key, or change what it may be", epilog=KEYS_EXAMPLES)
    trusted.add_argument(
        "key",
        metavar="KEY",
        help="as `zsfl keys show` prints on its machine, quoted; or name or id of one that is trusted",
    )
    trusted.add_argument("name", metavar="NAME", help="what to call it")
    trusted.add_argument("roles", nargs="*", metavar="ROLES", help=_ROLES_HELP)
    trusted.set_defaults(run_command=_trust)
    revoked = make(orders.add_parser, "revoke", help="trust a key no more", epilog=KEYS_EXAMPLES)
    revoked.add_argument("which", nargs="+", metavar="WHICH", help="key, name or machine id")
    revoked.set_defaults(run_command=_revoke)
    invite = make(commands.add_parser, "invite", help="pair this machine with another one", epilog=INVITE_EXAMPLES)
    invite.add_argument("--valid-s", type=float, default=600.0, metavar="S", help="seconds to wait (default: 600)")
    add_flags(invite, ("host", "port"))
    invite.set_defaults(run_command=_invite)
    joined = make(
        commands.add_parser, "join", help="pair this machine with the one that invites", epilog=INVITE_EXAMPLES
    )
    joined.add_argument(
        "token", metavar="TOKEN", help="what `zsfl invite` printed on the other one; - reads it from standard input"
    )
    joined.set_defaults(run_command=_join)
    for one in (invite, joined):
        one.add_argument("--roles", metavar="ROLES", help=f"what the other machine may be here: {_ROLES_HELP}")
        one.add_argument(
            "--name", metavar="NAME", help="what the other machine is to call this one; default: its host name"
        )
    for one in (show, listed, trusted, revoked, invite, joined):
        add_flags(one, ("keys",))


_ROLES_HELP = (
    f"some of {', '.join(Role)}, parted by commas; default: those it has been trusted with before, else all of them"
)


def _settings(args: argparse.Namespace) -> NodeSettings:
    given = {name: getattr(args, name, None) for name in ("keys", "host", "port")}
    return load_settings(given, os.environ)


def _folder(args: argparse.Namespace) -> Path:
    from zsfl.keys.secret import keys_folder

    return keys_folder(_settings(args).keys)


def _show(args: argparse.Namespace) -> int:
    from zsfl.keys.machine import machine_id
    from zsfl.keys.secret import own_keys

    folder = _folder(args)
    key = own_keys(folder).public
    print(f"machine  {machine_id(key)}")
    print(f"key      {key}")
    print(f"folder   {folder}")
    print(f"\nTo have another machine trust this one, run there: zsfl keys trust '{key}' {_own_name(None)}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from zsfl.keys.machine import machine_id
    from zsfl.keys.secret import own_keys
    from zsfl.keys.trusted import EVERY_ROLE, TrustFile

    folder = _folder(args)
    own = own_keys(folder).public
    others = [entry for key, entry in TrustFile(folder, own, print).known.items() if key != own]
    for entry in others:
        roles = "everything" if entry.roles == EVERY_ROLE else ", ".join(sorted(entry.roles))
        print(f"{machine_id(entry.key)}  {entry.name}: {roles}")
    if not others:
        print(f"{folder / 'trusted'} has no keys: pair this machine with another by `zsfl invite`")
    return 0


def _trust(args: argparse.Namespace) -> int:
    from zsfl.keys.secret import own_keys
    from zsfl.keys.trusted import Trusted, named, read_line, trust

    folder = _folder(args)
    own_keys(folder)
    known = named(folder, args.key)
    roles = args.roles or (sorted(known[0].roles) if len(known) == 1 else [])
    try:
        entry = read_line(" ".join((known[0].key if len(known) == 1 else args.key, args.name, ",".join(roles))))
    except ValueError as error:
        raise ConfigError(f"{error}; or the name or machine id of one that is trusted") from None
    if not isinstance(entry, Trusted):
        raise ConfigError(f"{args.key!r} is no key: expected the 40 characters that `zsfl keys show` prints, in quotes")
    print(_told(trust(folder, entry)))
    if not known:
        print("Is that the id which `zsfl keys show` says there? If not, a letter of the key is wrong: revoke it.")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from zsfl.keys.machine import machine_id
    from zsfl.keys.trusted import revoke

    for which in args.which:
        for entry in revoke(_folder(args), which):
            print(f"{entry.name}, {machine_id(entry.key)}, is not trusted any more; running nodes let go of it")
    return 0


def _invite(args: argparse.Namespace) -> int:
    import asyncio

    from zsfl.pairing.enrolling import Inviter, checked

    settings, folder, valid_s = _settings(args), _folder(args), checked(args.valid_s)
    entry, name = _entry(args), _own_name(args.name)
    hosts = [settings.host] if args.host else _hosts(settings.host)

    def told(token: str) -> None:
        within = f"{valid_s / 60:.3g} minutes" if valid_s >= 120 else f"{valid_s:.3g} second{'s' * (valid_s != 1)}"
        print(f"On the other machine, within {within}, run:\n\n    zsfl join {token}\n")
        print("or, where others see what runs there, `zsfl join -`, which asks for the token.", flush=True)

    async def run() -> int:
        inviter = Inviter(folder, entry, name)
        try:
            await inviter.run(hosts, settings.port, valid_s, told)
        finally:
            if inviter.trusted is not None:
                print(_told(inviter.trusted), flush=True)
            if inviter.wrong:
                print(
                    f"Somebody came {number_of(inviter.wrong, 'time')} with a wrong secret, and was turned away.",
                    flush=True,
                )
        return 0

    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        return 130


def _join(args: argparse.Namespace) -> int:
    import asyncio

    from zsfl.pairing.enrolling import join

    given: str = args.token
    token = _read_token() if given == "-" else given
    print(_told(asyncio.run(join(_folder(args), token, _own_name(args.name), _entry(args)))))
    print("Start nodes with --host and the address of this machine: they find one another, and are encrypted.")
    return 0


def _read_token() -> str:
    """From standard input; from a terminal one line, which it does not show."""
    import getpass
    import sys

    from zsfl.keys.tokens import MAX_TOKEN

    try:
        if sys.stdin.isatty():
            token = getpass.getpass("Token: ")
        else:
            token = sys.stdin.buffer.read(2 * MAX_TOKEN).decode(errors="replace")
    except (EOFError, AttributeError):  # there is none
        token = ""
    if not token.strip():
        raise ConfigError("there is no token on standard input: give what `zsfl invite` printed on the other machine")
    return token


def _entry(args: argparse.Namespace) -> Callable[[PublicKey, str], Any]:
    """As what to trust who comes: what is said, else what it was trusted as before, else everything."""
    from zsfl.keys.trusted import EVERY_ROLE, Trusted, named, read_roles

    folder = _folder(args)
    try:
        roles = read_roles(args.roles) if args.roles else None
    except ValueError as error:
        raise ConfigError(f"--roles: {error}") from None

    def entry(key: PublicKey, name: str) -> Trusted:
        before = [one.roles for one in named(folder, key)]
        return Trusted(key=key, name=name, roles=roles or (*before, EVERY_ROLE)[0])

    return entry


def _told(entry: Any) -> str:
    from zsfl.keys.machine import machine_id
    from zsfl.keys.trusted import EVERY_ROLE

    roles = "everything" if entry.roles == EVERY_ROLE else ", ".join(sorted(entry.roles))
    return f"This machine trusts {entry.name}, {machine_id(entry.key)}, from now on, as: {roles}"


def _own_name(given: str | None) -> str:
    if given is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", given):
            raise ConfigError(f"--name is {given!r}: expected up to 63 letters, digits, dots, - and _")
        return given
    name = re.sub(r"[^A-Za-z0-9._-]", "-", os.uname().nodename.split(".")[0])[:40].lstrip(".-_")
    return name or "machine"


def _hosts(host: str) -> list[str]:
    """Where another machine can reach this one: the address given, else all of its own; at least this machine can."""
    import ifaddr

    from zsfl.wire.door import is_loopback

    if not is_loopback(host):
        return [host]
    found = [
        str(address.ip)
        for adapter in ifaddr.get_adapters()
        for address in adapter.ips
        if address.is_IPv4 and not is_loopback(str(address.ip))
    ]
    if not found:
        print(f"This machine has no address that another one could reach; inviting on {host}.", flush=True)
    return found or [host]
