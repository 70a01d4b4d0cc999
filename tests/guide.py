"""The code of README and docs/, as tests run it."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
LOSSES = "torchtitan.components.loss"


class BaseLoss:
    """As torchtitan 0.3.0 derives from it: configurations build the class that they are of."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        """It knows whose it is."""

        _owner: ClassVar[type | None] = None

        def build(self, **kwargs):
            return self._owner(config=self, **kwargs)

    def __init_subclass__(cls):
        """Tell its configuration."""
        cls.Config._owner = cls


class ChunkedLossWrapper(BaseLoss):
    """What the trainer gives `lm_head`, and calls with hidden states."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Of which a fused loss uses nothing."""

        num_chunks: int = 8

    def __init__(self, config, *, compile_config=None):
        """Without a head yet."""
        self.lm_head = None

    def set_lm_head(self, lm_head):
        self.lm_head = lm_head


def run(section="", page="docs/guide.md"):
    """The names that all Python of a section (by its title) or the page defines, one by one."""
    page = (ROOT / page).read_text("utf-8")
    if section:
        page = page.partition(f"\n## {section}")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"__name__": "docs.guide", "n_blocks": len(blocks)}
    with pytest.MonkeyPatch.context() as patch:
        try:
            __import__(LOSSES)
        except ImportError:
            stand_in = ModuleType(LOSSES)
            stand_in.BaseLoss, stand_in.ChunkedLossWrapper = BaseLoss, ChunkedLossWrapper
            patch.setitem(sys.modules, LOSSES, stand_in)
        for block in blocks:
            exec(block, names)
    return names
