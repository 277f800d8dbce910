"""What a fit will take, before it begins: rows, chunks, passes, memory, disk."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flows.config import Config
from flows.terminal import bytes_text
from genstream.errors import ConfigError

if TYPE_CHECKING:
    from genstream.sources import Source
    from genstream.story import Story

MIB = 2**20
