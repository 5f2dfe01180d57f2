"""Which files of a job its nodes on other machines need."""

from __future__ import annotations

from pathlib import Path

from zsfl.cluster.on_ray.sources import imported_by

FILES = {
    "job.py": "import zsfl\nimport torch, parts.head\nfrom nets import body\ndef data():\n    import late as l",
    "parts/__init__.py": "",
    "parts/head.py": "from . import sizes\nfrom .deep.down import x",
    "parts/sizes.py": "import job",
    "parts/deep/down.py": "from ..sizes import y",
    "nets/body.py": "this is no Python",
    "late.py": "",
    "unused.py": "",
    "zsfl/__init__.py": "",
}


def test_what_it_imports_from_its_own_folder_and_nothing_else(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(imported_by(tmp_path / "job.py")) == FILES.keys() - {"job.py", "unused.py", "zsfl/__init__.py"}
    assert imported_by(tmp_path / "nets" / "body.py") == []
