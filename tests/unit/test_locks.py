"""One process at a time in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zsfl.errors import ConfigError
from zsfl.locks import lock_folder


def test_a_folder_has_one_holder_until_it_is_let_go(tmp_path: Path) -> None:
    first = lock_folder(tmp_path, "use another")
    with pytest.raises(ConfigError, match=r"another process uses .*\.lock\); use another"):
        lock_folder(tmp_path, "use another")
    os.close(first)
    os.close(lock_folder(tmp_path, "use another"))
