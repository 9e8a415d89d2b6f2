"""Imports lowrank when transformers or diffusers load their models; run at every start of Python.

So stock scripts load compressed checkpoints without naming lowrank. It holds no more than it must:
nothing of lowrank or torch is imported before. LOWRANK_AUTOLOAD=0 switches it off.
"""

import os
import sys

# Whichever comes first, lowrank is there before it runs, and waits for the others itself.
TARGETS = (
    "transformers.modeling_utils",
    "transformers.quantizers.auto",
    "diffusers.models.modeling_utils",
    "diffusers.quantizers.auto",
)


class Finder:
    """Finds nothing itself: at the first of the targets it imports lowrank, and leaves."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in TARGETS or Finder not in sys.meta_path:
            return None
        import importlib.util
        import warnings

        sys.meta_path.remove(Finder)
        try:
            import lowrank  # noqa: F401, waits for this very module, and registers after it
        except Exception as error:  # whatever it is, transformers has to load
            warnings.warn(f"lowrank could not be imported: {error}", stacklevel=2)
        return importlib.util.find_spec(name)


if os.environ.get("LOWRANK_AUTOLOAD", "1") != "0":
    sys.meta_path.insert(0, Finder)
