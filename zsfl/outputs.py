"""Standard output and error that nobody reads any more."""

import os
import select


def drop_unread() -> bool:
    """Drop from now on what is printed where nobody reads it any more; whether there is such a place."""
    unread = False
    for number in (1, 2):
        look = select.poll()
        look.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            unread = True
    return unread
