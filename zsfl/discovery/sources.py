"""What else than mDNS and peers tells of nodes, as the settings of a node name it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from zsfl.discovery.announced import Recogniser, job_hash
from zsfl.discovery.dns import follow_name
from zsfl.discovery.events import Candidate
from zsfl.discovery.folder import Folder
from zsfl.ids import PROTOCOL, NodeCard
from zsfl.settings import NodeSettings

Follow = Callable[[Callable[[Candidate], None], Callable[[str, str], None]], Coroutine[Any, Any, None]]


def sources(
    settings: NodeSettings, card: NodeCard, facts: Mapping[str, str], keys: Callable[[], Iterable[str]]
) -> Iterator[tuple[str, Follow]]:
    """What each is called, and what follows it: that tells of whom it finds, and notes what is in the way.

    Who only looks may not know the `facts` of the job; `keys` are those of the machines whose nodes may be peers.
    """
    for place in settings.dns:
        yield f"look up {place}", partial(follow_name, place)
    if settings.meet:
        job = job_hash(facts["name"], facts.get("cluster", "")) if "name" in facts else None
        ours = None if job is None else Recogniser(job, PROTOCOL, keys)
        yield "meet", Folder(Path(settings.meet).expanduser(), card, ours).follow
