"""Tests share one build of the C++ kernels, and know nothing of what was measured on this machine."""

import os
import tempfile
from pathlib import Path

os.environ["HASTEN_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"hasten-tests-{os.getuid()}")
